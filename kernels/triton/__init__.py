"""Kernels of this language, one file per op family."""
