"""Adaptation at inference: to texts, to the reward of prompts, to a fitness of one's own."""

from grpocem_jax.adaptation.adapted import (
    check_room,
    complete,
    count_tokens,
    log_likelihoods,
    room,
)
from grpocem_jax.adaptation.texts import Text, batch, encode, hold_back, num_held_back
from grpocem_jax.adaptation.workflow import (
    HELD_BACK_SAMPLES,
    LIBRARY,
    Adaptation,
    adapt,
    make_fitness,
    make_space,
    summary,
)
from grpocem_jax.runs.trained import TrainedRun, load_base, load_run

__all__ = [
    "HELD_BACK_SAMPLES",
    "LIBRARY",
    "Adaptation",
    "Text",
    "TrainedRun",
    "adapt",
    "batch",
    "check_room",
    "complete",
    "count_tokens",
    "encode",
    "hold_back",
    "load_base",
    "load_run",
    "log_likelihoods",
    "make_fitness",
    "make_space",
    "num_held_back",
    "room",
    "summary",
]
