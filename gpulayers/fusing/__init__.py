"""Layers of one's own, written in array code, that run as one Triton kernel each way.

``fuse(layer)`` records the code (``gpulayers.export.recording``), reads each direction as tiles of rows and columns
(``_axes``, ``_program``), writes kernels that a person can read (``_statements``, ``_kernel``, ``_file``), and makes them
an op (``_fusion``, ``_launch``), which dispatch chooses, explains, checks and tapes as any other. Code that is no one
kernel is cut (``_cuts``) into fused pieces (``_piece``) and what runs by itself between them (``_alone``, ``_split``).
"""

from gpulayers.fusing._by_hand import by_hand
from gpulayers.fusing._fusion import Fusion
from gpulayers.fusing._layer import explain, fuse, fusion
from gpulayers.fusing._refusal import FusionError
from gpulayers.fusing._split import Explained, Split

__all__ = ["Explained", "Fusion", "FusionError", "Split", "by_hand", "explain", "fuse", "fusion"]
