"""Serving: many users at once, each with an adapter."""
