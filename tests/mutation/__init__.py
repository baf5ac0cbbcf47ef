"""Faults seeded in kernels, one at a time, to see whether the tests notice."""
