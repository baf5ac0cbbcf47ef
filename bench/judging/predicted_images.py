"""What pooling, resizing, windows and padding should take on an H200, in bfloat16: reckoned from bytes and machine code.

    python -m gpulayers.bench.judging.predicted_images [pooling resize window padding]

Kernels are compiled for sm_90, no GPU is asked. A launch takes as long as the slower of two: its bytes at a copy's rate, and its
instructions at the rate at which warps are issued. Loops run as often as the constants of a launch say (a window's rows; a
resizing's taps; of nested loops the whole body, which is more than is issued), other instructions once. To be held against the next run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

from gpulayers.bench.cases.case import CHANNELS_LAST, Case
from gpulayers.bench.judging.predicted import CLOCK, COPY, H200
from gpulayers.bench.judging.predicted_rows import ISSUED, START

from gpulayers._table import table
from gpulayers.arrays import bfloat16
from gpulayers.ops.padding import pad
from gpulayers.ops.pooling import adaptive_avg_pool, avg_pool, max_pool
from gpulayers.ops.resize import interpolate
from gpulayers.ops.window import channel_shuffle, pixel_shuffle, unfold
from gpulayers.sweep._calls import Call
from gpulayers.testing._sass import run_through
from gpulayers.testing.audit import audit
from gpulayers.testing.compiling import Planned

THREE: dict[str, Any] = {"kernel_size": 3, "padding": 1}
CALLS: dict[str, list[tuple]] = {
    "pooling": [
        ("ResNet-50 3×3/2", max_pool, (128, 64, 112, 112), {**THREE, "stride": 2}),
        ("VGG 2×2/2", max_pool, (128, 128, 56, 56), {"kernel_size": 2}),
        ("DenseNet 2×2/2", avg_pool, (128, 128, 56, 56), {"kernel_size": 2}),
        ("Inception 3×3/1", avg_pool, (128, 192, 32, 32), {**THREE, "stride": 1, "count_include_pad": False}),
        ("rows of 35, 3×3/1", avg_pool, (128, 192, 35, 35), {**THREE, "stride": 1}),
        ("ResNet-50 head", adaptive_avg_pool, (128, 2048, 7, 7), {"output_size": 1}),
    ],
    "resize": [
        ("Stable Diffusion 2×, nearest", interpolate, (16, 320, 32, 32), {"size": (64, 64), "mode": "nearest"}),
        ("2×, bilinear", interpolate, (16, 320, 32, 32), {"size": (64, 64), "mode": "linear"}),
        ("½, area", interpolate, (16, 320, 64, 64), {"size": (32, 32), "mode": "area"}),
        ("32² to 72², bilinear", interpolate, (16, 320, 32, 32), {"size": (72, 72), "mode": "linear"}),
        (
            "56² to 112², corners aligned",
            interpolate,
            (16, 128, 56, 56),
            {"size": (112, 112), "mode": "linear", "align_corners": True},
        ),
        ("32² to 72², nearest", interpolate, (16, 320, 32, 32), {"size": (72, 72), "mode": "nearest"}),
        ("64² to 24², area", interpolate, (16, 320, 64, 64), {"size": (24, 24), "mode": "area"}),
        ("64² to 144², bicubic", interpolate, (16, 64, 64, 64), {"size": (144, 144), "mode": "cubic"}),
        (
            "504² to 224², antialiased",
            interpolate,
            (16, 3, 504, 504),
            {"size": (224, 224), "mode": "linear", "antialias": True},
        ),
    ],
    "window": [
        ("3×3/1", unfold, (64, 64, 56, 56), THREE),
        ("patches of 16²", unfold, (64, 3, 224, 224), {"kernel_size": 16, "stride": 16}),
        ("2×", pixel_shuffle, (64, 256, 64, 64), {"upscale_factor": 2}),
        ("by 3", channel_shuffle, (64, 240, 28, 28), {"groups": 3}),
    ],
    "padding": [
        ("by 1", pad, (16, 320, 64, 64), {"padding": 1}),
        ("by 1, reflected", pad, (16, 320, 64, 64), {"padding": 1, "mode": "reflect"}),
        ("by 1, edges repeated", pad, (16, 320, 64, 64), {"padding": 1, "mode": "replicate"}),
        ("by 3, around", pad, (16, 320, 64, 64), {"padding": 3, "mode": "circular"}),
    ],
}
HEAD = ("", "order", "kernel", "moved", "MB", "registers", "instructions", "issue", "µs", "of the limit")


def line(case: Case, direction: str, launches: list[Planned]) -> tuple:
    """One direction of a case, of one kernel, or of one that does the work and others that add up what it leaves."""
    compiled = [launch.compile() for launch in launches]
    first, report = compiled[0], audit(compiled[0])
    issued = sum(_issued(one) for one in compiled)
    moved = case.traffic(bfloat16)[direction].total
    of_bytes, of_code = moved / COPY, issued / H200.sms / CLOCK / ISSUED
    seconds = max(of_bytes, of_code) + START * len(compiled)
    made = moved / 2  # numbers
    return (
        f"{case.op.name} {case.name}, {direction}", "NHWC" if case.order else "NCHW", first.kernel.strip("_"), report.widths,
        f"{moved / 1e6:.0f}", report.registers, f"{issued * 32 / made:.1f}", f"{of_code / of_bytes:.2f}",
        f"{seconds * 1e6:.1f}", f"{of_bytes / max(of_bytes, of_code):.2f}",
    )  # fmt: skip


def _issued(one: Any) -> float:
    """Instructions of all its warps."""
    fixed, laps = one.constexprs, 1
    if not {"V", "UH"} & set(fixed):  # kernels of runs and of blocks have no loop
        loops = ("KD", "KH", "KW") if "TALL" in fixed else ("LAPS_D", "LAPS_H") if "LAPS_H" in fixed else ("KD", "KH")
        laps = math.prod(fixed.get(name, 1) for name in loops)
        laps *= math.prod(fixed.get(name, 1) for name in ("UP", "OVER"))
        laps //= fixed["MANY"] if "OVER" in fixed else 1
        laps = 1 if "TIMES" in fixed else fixed["KH"] // fixed["STEP"] if "STEP" in fixed else laps
    again = run_through(one.cubin, one.arch, looped=True)["all"] * (laps - 1) if laps > 1 else 0
    return (run_through(one.cubin, one.arch, looped=False)["all"] + again) * one.warps * math.prod(one.grid)


def lines(families: Iterable[str]) -> list[tuple]:
    found = []
    for name, op, shape, options in (call for family in families for call in CALLS[family]):
        for order in (None, CHANNELS_LAST):
            case = Case(op, f"{name}, {'×'.join(map(str, shape))}", (shape,), options, order=order)
            launched = Call(case, bfloat16).launched(H200.arch)
            backward = next((i for i, one in enumerate(launched) if i and _turns(one, launched[0])), 1)
            found.append(line(case, "forward", launched[:backward]))
            found.append(line(case, "backward", launched[backward:] or launched[:backward]))
    return found


def _turns(one: Planned, first: Planned) -> bool:
    """Whether the backward's launches begin here: not with a second stage of the forward's sums."""
    return one.kernel != "_finish_kernel" and (one.kernel != first.kernel or one.key != first.key)


if __name__ == "__main__":
    print(table(HEAD, lines(sys.argv[1:] or CALLS)))
