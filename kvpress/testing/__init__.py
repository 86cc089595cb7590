"""Helpers for tests of caches, policies and tiers."""
