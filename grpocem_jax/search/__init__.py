"""Search for an adapter: methods, spaces, fitness, and the loop that brings them together.

A method is anything that keeps to `SearchMethod`; the loop (`maximize`, `cross_fit` with the gate,
and their pure kernel `advance`) does everything else.
"""

from grpocem_jax.search.base import Point, SearchMethod, check_method
from grpocem_jax.search.cem import CEM, CEMState
from grpocem_jax.search.drivers import HostFitness
from grpocem_jax.search.eggroll import Eggroll, EggrollState
from grpocem_jax.search.evosax import Evosax, EvosaxState
from grpocem_jax.search.fitness import Likelihood, Texts
from grpocem_jax.search.gate import Verdict, judge, scaled
from grpocem_jax.search.gradient import GradientAscent, GradientState
from grpocem_jax.search.kernel import (
    FOLLOWED,
    Fitness,
    History,
    Problem,
    SearchState,
    advance,
    begin,
)
from grpocem_jax.search.loop import SearchResult, cross_fit, maximize
from grpocem_jax.search.spaces import Space, decode, expert_space, full_space, principal_space

METHODS = {"eggroll": Eggroll}
"""Methods by the names that configs have for them, beside those with a section of their own."""

__all__ = [
    "CEM",
    "FOLLOWED",
    "METHODS",
    "CEMState",
    "Eggroll",
    "EggrollState",
    "Evosax",
    "EvosaxState",
    "Fitness",
    "GradientAscent",
    "GradientState",
    "History",
    "HostFitness",
    "Likelihood",
    "Point",
    "Problem",
    "SearchMethod",
    "SearchResult",
    "SearchState",
    "Space",
    "Texts",
    "Verdict",
    "advance",
    "begin",
    "check_method",
    "cross_fit",
    "decode",
    "expert_space",
    "full_space",
    "judge",
    "maximize",
    "principal_space",
    "scaled",
]
