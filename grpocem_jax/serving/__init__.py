"""Many users at once on one frozen model, each with an adapter of its own.

`engine` completes their requests and `searches` advances their searches, side by side; `server` is
the HTTP interface of both, with the adapters that `store` keeps.
"""

from grpocem_jax.serving.engine import Engine, Piece, Request, Stats, Ticket
from grpocem_jax.serving.options import Limits, Options

__all__ = ["Engine", "Limits", "Options", "Piece", "Request", "Stats", "Ticket"]
