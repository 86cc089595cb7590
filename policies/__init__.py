"""Policies: one method a file."""
