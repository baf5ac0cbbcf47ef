"""Writes the README's figures from bench/results: ``python bench/report.py``."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # run as a file, from a bare checkout
    sys.path[:] = [str(ROOT), *(p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT / "bench")]

from gpulayers.bench._timing import geometric_mean  # noqa: E402

CPU = ROOT / "bench/results/cpu/cpu.json"


def cpu_markdown(results: dict[str, Any]) -> str:
    """A line an op: the time of forward and backward as a multiple of torch's, over its cases."""
    lines = ["| op | cases | geometric mean | best | worst |", "|---|---|---|---|---|"]
    by_op: dict[str, list[float]] = {}
    for row in results["against_torch"]:
        by_op.setdefault(row["op"], []).append(row["ratio"])
    for op, ratios in by_op.items():
        lines.append(f"| {op} | {len(ratios)} | {geometric_mean(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |")
    everything = [r for ratios in by_op.values() for r in ratios]
    gemm = [row["ratio"] for row in results["against_torch"] if row["gemm"]]
    at, cost, host = results["machine"], results["import"], results["host"]
    above = max(row["above_us"] for row in results["dispatch"])
    lines += [
        "",
        f"Time as a multiple of torch's, float32, forward and backward, two threads: geometric mean "
        f"**{geometric_mean(everything):.2f}** over {len(everything)} cases, {max(gemm):.2f} at most where a matrix product "
        f"bounds. A dispatched call costs {above:.1f} µs above the function it calls, `import gpulayers` {cost['above']:.2f} s "
        f"above NumPy's. gpulayers.torch costs {_span(host, 'forward_us')} µs a forward above a stubbed launch, "
        f"{_span(host, 'with_grad_us')} µs with gradients (torch.nn's own layers, kernels included: "
        f"{_span(host, 'torch_forward_us')} µs), and at most {max(r['backward_ratio'] for r in host):.2f} times torch.nn's "
        f"backward. Measured {at['date'][:10]} at {at['commit']} on two cores of {at['processor']}, Python {at['python']}, "
        f"NumPy {at['numpy']}, torch {at['torch']}; every case is in `bench/results/cpu/cpu.json`.",
    ]
    return "\n".join(lines)


def _span(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows]
    return f"{min(values):.0f}–{max(values):.0f}"


def between(text: str, mark: str) -> str:
    """What stands between <!-- mark --> and <!-- /mark -->."""
    return text.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0].strip()


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    old = between(text, "cpu")
    block = f"<!-- cpu -->\n{cpu_markdown(json.loads(CPU.read_text()))}\n<!-- /cpu -->"
    start, end = text.index("<!-- cpu -->"), text.index("<!-- /cpu -->") + len("<!-- /cpu -->")
    readme.write_text(text[:start] + block + text[end:])
    print("README.md is up to date" if between(readme.read_text(), "cpu") == old else "README.md was written")


if __name__ == "__main__":
    main()
