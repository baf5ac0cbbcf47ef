"""Holding kernels, ops and layers against their definitions: on a GPU, and without one."""

from gpulayers.testing.audit_op import audit_op
from gpulayers.testing.check_layer import check_layer
from gpulayers.testing.check_op import CheckError, check_op
from gpulayers.testing.report import Report

__all__ = ["CheckError", "Report", "audit_op", "check_layer", "check_op"]
