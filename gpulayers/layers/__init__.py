"""Layers: weights, shapes and config over the ops; torch's names, signatures and weight layouts."""
