"""Mutants that once passed every test, as text: module, what stands there, what stands there instead, in words."""

NAMED = []
