"""Adapters: a small trainable pytree behind pure functions."""
