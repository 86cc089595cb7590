"""Memory and time: profiles, what fits, and decoding against the stock cache."""

from kvpress.profiling.context import Profile, profile

__all__ = ["Profile", "profile"]
