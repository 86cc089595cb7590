"""Helpers for tests of this package, and for people who write policies."""
