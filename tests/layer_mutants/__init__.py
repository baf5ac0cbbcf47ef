"""Faulty layers, each proven faulty without ``check_layer``, and right ones: what ``check_layer`` is judged by."""

from layer_mutants import calls, contract, gradients, memory, modes, right, shapes, state, values, weights
from layer_mutants._kinds import MUTANTS, RIGHT

__all__ = [
    "MUTANTS",
    "RIGHT",
    "calls",
    "contract",
    "gradients",
    "memory",
    "modes",
    "right",
    "shapes",
    "state",
    "values",
    "weights",
]
