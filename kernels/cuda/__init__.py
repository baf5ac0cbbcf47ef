"""Kernels of this language, one file per op family; and what a kernel of your own is launched with."""

from ._launch import Source

__all__ = ["Source"]
