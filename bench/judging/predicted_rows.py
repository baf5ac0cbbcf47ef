"""What norms, activations and gated units should take on an H200, in bfloat16: reckoned from bytes, launches and machine code.

    python -m gpulayers.bench.judging.predicted_rows [norm activation]

Kernels are compiled for sm_90, no GPU is asked. A multiprocessor works in rounds, of rows or of a program each. They take as long
as the slowest of three: their bytes at a copy's rate; their instructions at the rate at which warps are issued; and a block's
round, instructions and what it waits for, shared by the blocks that are there at once. ``COPY`` was measured on an H200.
``LATENCY`` is such that two times measured there with an earlier text come out to a tenth (0.41 of the copy's rate for layer norm's
backward of 8192×5120, 0.73 for RMS norm's of 8192×4096): one block of 16 warps and two of 8 that waited for their rows' memory in
each round. ``CHAIN`` is that without the memory, of the reduction alone. To be held against the next run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence

from gpulayers.bench.cases.case import Case, every_case
from gpulayers.bench.judging.predicted import CLOCK, COPY, H200

from gpulayers._table import table
from gpulayers.arrays import bfloat16
from gpulayers.sweep._calls import Call
from gpulayers.testing._sass import run_through
from gpulayers.testing.audit import audit
from gpulayers.testing.compiling import Planned

ISSUED, SPECIAL = 4 * 0.9, 0.5
"""Instructions of warps that a multiprocessor begins in a cycle at best, and those of them that are MUFU."""
CHAIN, LATENCY = 700, 2500
"""Cycles that a block waits in a round whose rows are in shared memory already, and in one that loads them first."""
START, L2 = 2e-6, 6e12
"""Seconds of a kernel until its first bytes and after its last; bytes of L2 a second."""
OPS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "relu", "gelu", "silu", "glu", "gated")
HEAD = ("", "launches", "MB", "registers", "blocks", "instructions", "MUFU", "issue", "µs", "of the limit")


def line(case: Case, direction: str, launches: Sequence[Planned]) -> tuple:
    """One direction of a case: the first kernel does the work, others add up what it leaves in L2."""
    first, *others = (launch.compile() for launch in launches)
    report, fixed = audit(first), first.constexprs
    looped = "each" in first.signature
    code = run_through(first.cubin, first.arch, looped)
    shape = case.shapes[0]
    rounds = math.ceil(math.prod(shape[:-1]) / fixed["ROWS"]) if looped else math.prod(first.grid)
    elements = math.prod(case.shapes[0]) / rounds
    moved = case.traffic(bfloat16)[direction].total
    at_once = min(report.blocks_per_sm, math.ceil(math.prod(first.grid) / H200.sms))
    issue = max(code["all"] * first.warps / ISSUED, code["MUFU"] * first.warps / SPECIAL)
    alone = issue + (CHAIN if fixed.get("STAGES", 1) > 1 else LATENCY)
    of_bytes, of_code = moved / COPY, rounds / H200.sms / CLOCK
    sums = sum(START + 2 * 4 * math.prod(first.grid) * shape[-1] * 2 / L2 for _ in others)
    seconds = max(of_bytes, of_code * max(issue, alone / at_once)) + START + sums
    threads = 32 * first.warps / elements
    return (
        f"{case.op.name} {case.name}, {direction}", len(launches), f"{moved / 1e6:.0f}", report.registers, at_once,
        f"{code['all'] * threads:.1f}", f"{code['MUFU'] * threads:.2f}", f"{of_code * issue / of_bytes:.2f}",
        f"{seconds * 1e6:.1f}", f"{of_bytes / seconds:.2f}",
    )  # fmt: skip


def lines(families: Iterable[str]) -> list[tuple]:
    """Of large cases in both directions."""
    found = []
    for _, case in every_case([*families]):
        if case.op.name not in OPS or case.cpu or not 2e7 < math.prod(case.shapes[0]) < 4e8:
            continue
        launched = Call(case, bfloat16).launched(H200.arch)
        for direction in ("forward", "backward"):
            own = [launch for launch in launched if ("forward" in launch.kernel) == (direction == "forward")]
            if own and "ROWS" in own[0].constexprs:  # rows that one program holds
                found.append(line(case, direction, own))
    return found


if __name__ == "__main__":
    print(table(HEAD, lines(sys.argv[1:] or ("norm", "activation"))))
