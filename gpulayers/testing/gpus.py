"""The architectures that kernels are compiled for, and one GPU of each: what the compiler and the audit reckon with."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """What a GPU has; shared memory in bytes. From NVIDIA's tuning guides and the tables of the CUDA C++ guide."""

    multiprocessors: int
    threads: int
    """That a multiprocessor holds, as it does the blocks, the shared memory and the registers."""
    blocks: int
    shared: int
    block_shared: int
    """That one block may take."""
    registers: int = 65536


GPUS = {  # compute capability -> A100, RTX 3090 Ti, L40S, H100, B200, RTX 5090
    80: Gpu(108, 2048, 32, 167936, 166912),
    86: Gpu(84, 1536, 16, 102400, 101376),
    89: Gpu(142, 1536, 24, 102400, 101376),
    90: Gpu(132, 2048, 32, 233472, 232448),
    100: Gpu(148, 2048, 32, 233472, 232448),
    120: Gpu(170, 1536, 24, 102400, 101376),
}
