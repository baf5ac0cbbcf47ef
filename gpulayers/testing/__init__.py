"""Holding kernels, ops and layers against their definitions: on a GPU, and without one."""

from gpulayers.testing.check_layer import check_layer
from gpulayers.testing.check_op import CheckError, check_op

__all__ = ["CheckError", "check_layer", "check_op"]
