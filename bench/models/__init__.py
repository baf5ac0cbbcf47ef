"""Whole models in plain torch.nn, one a file, and how each is trained. Imports no other room of bench."""
