"""The search for the kernels' configurations. Imports cases, measuring, reporting."""
