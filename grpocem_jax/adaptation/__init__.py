"""Adaptation at inference: to texts, to the reward of prompts, to a fitness of one's own."""

from grpocem_jax.adaptation.adapted import (
    check_room,
    complete,
    count_tokens,
    log_likelihoods,
    room,
)
from grpocem_jax.adaptation.texts import Text, batch, encode, halves
from grpocem_jax.adaptation.vote import Vote, best_perturbations, vote
from grpocem_jax.adaptation.workflow import (
    JUDGED_SAMPLES,
    LIBRARY,
    Adaptation,
    adapt,
    make_fitness,
    make_space,
    summary,
)
from grpocem_jax.runs.trained import TrainedRun, load_base, load_run

__all__ = [
    "JUDGED_SAMPLES",
    "LIBRARY",
    "Adaptation",
    "Text",
    "TrainedRun",
    "Vote",
    "adapt",
    "batch",
    "best_perturbations",
    "check_room",
    "complete",
    "count_tokens",
    "encode",
    "halves",
    "load_base",
    "load_run",
    "log_likelihoods",
    "make_fitness",
    "make_space",
    "room",
    "summary",
    "vote",
]
