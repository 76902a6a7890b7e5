"""Many requests at once from one frozen model, each with an adapter of its own."""

from grpocem_jax.serving.engine import Engine, Piece, Request, Stats, Ticket

__all__ = ["Engine", "Piece", "Request", "Stats", "Ticket"]
