"""Writes the figures of docs/performance.md from bench/results: ``python bench/report.py [--add FOLDER]``.

--add: take the results that ``gpulayers bench --gpu --out FOLDER`` (or ``--models``) wrote into ``bench/results/<gpu>/``, and draw them. Why a
kernel stays below its limit stands beside them, by hand, in ``reasons.json``: {"op" or "op: case": "the reason"}.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # run as a file, from a bare checkout
    sys.path[:] = [str(ROOT), *(p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT / "bench")]

from gpulayers.bench.cases.case import BESIDE  # noqa: E402
from gpulayers.bench.measuring.records import Results, Row, failed, load, slug, write_json  # noqa: E402
from gpulayers.bench.measuring.timing import geometric_mean  # noqa: E402
from gpulayers.bench.reporting import against, models, plots, tables  # noqa: E402
from gpulayers.bench.reporting.tables import call  # noqa: E402
from gpulayers.bench.suite.reach import in_words  # noqa: E402

RESULTS = ROOT / "bench/results"
NONE = "No GPU figures exist yet: `gpulayers bench --gpu` makes them."
LOW = 0.7
"""A kernel below this share of its limit is listed, with the reason."""


def blocks(results: pathlib.Path = RESULTS) -> dict[str, str]:
    """What stands in docs/performance.md, by mark."""
    cpu = json.loads((results / "cpu/cpu.json").read_text())
    return {"cpu": cpu_markdown(cpu), "gpu": gpu_markdown(results)}


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
    at, cost, host, python = (results[name] for name in ("machine", "import", "host", "python"))
    above = max(row["above_us"] for row in results["dispatch"])
    lines += [
        "",
        f"Time as a multiple of torch's, float32, forward and backward, two threads: geometric mean "
        f"**{geometric_mean(everything):.2f}** over {len(everything)} cases, {max(gemm):.2f} at most where a matrix product "
        f"bounds. A dispatched call costs {above:.1f} µs above the function it calls, `import gpulayers` {cost['above']:.2f} s "
        f"above NumPy's. gpulayers.torch costs {_span(host, 'forward_us')} µs a forward above a stubbed launch, "
        f"{_span(host, 'with_grad_us')} µs with gradients (torch.nn's own layers, kernels included: "
        f"{_span(host, 'torch_forward_us')} µs), and at most {max(r['backward_ratio'] for r in host):.2f} times torch.nn's "
        f"backward; where this was measured, an empty Python call took {python['call_us']:.3f} µs, torch's relu of 64 numbers "
        f"{python['relu_us']:.1f} µs. Measured {at['date'][:10]} at {at['commit']} on two cores of {at['processor']}, "
        f"Python {at['python']}, NumPy {at['numpy']}, torch {at['torch']}; every case is in `bench/results/cpu/cpu.json`.",
    ]
    return "\n".join(lines)


def _span(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows]
    return f"{min(values):.0f}–{max(values):.0f}"


# --- GPUs ------------------------------------------------------------------------------------------------------------


def gpu_markdown(results: pathlib.Path) -> str:
    """A section for each GPU folder; without one, that there is none."""
    there = {p.parent for name in ("bench", "models") for p in results.glob(f"*/{name}.json")}
    folders = sorted(there - {results / "cpu"})
    return "\n\n".join(map(_gpu_section, folders)) or NONE


def _gpu_section(folder: pathlib.Path) -> str:
    where = f"bench/results/{folder.name}"
    drawn = [f"![{p.stem}](../{where}/{p.name})" for p in sorted(folder.glob("*.png"))]
    parts, device = [], folder.name
    if (folder / "bench.json").exists():
        found = load(folder / "bench.json")
        device, parts = found["processes"][-1]["about"].get("device"), _ops(found, folder, where)
    if (folder / "models.json").exists():
        whole = json.loads((folder / "models.json").read_text())
        device = whole["about"]["device"]
        parts += [
            f"Whole models, {whole['machine']['date'][:10]} at {whole['machine']['commit']}.",
            models.markdown(whole),
        ]
    return "\n\n".join(filter(None, [f"### {device}", *parts, "\n".join(drawn)]))


def _ops(found: Results, folder: pathlib.Path, where: str) -> list[str]:
    dtype = found["rows"][0]["dtype"] if found["rows"] else "bfloat16"
    rows = [r for r in found["rows"] if r["family"] not in BESIDE]
    reasons = folder / "reasons.json"
    return [
        _head(found, where),
        _tests(folder / "tests.json"),
        _table([r for r in rows if r["dtype"] == dtype], dtype),
        _slow([r for r in rows if r["dtype"] == dtype], json.loads(reasons.read_text()) if reasons.exists() else {}),
        _written(found["rows"]),
        _without(found["rows"]),
    ]


def _head(found: Results, where: str) -> str:
    machine, process = found["machine"], found["processes"][-1]
    about, limits = process["about"], process["limits"]
    named = (("driver ", "driver", ""), ("clock ", "sm_mhz_max", " MHz"), ("", "watts_limit", " W"), ("CUDA ", "cuda", ""))  # fmt: skip
    facts = [f"{before}{_plain(about[key])}{after}" for before, key, after in named if about.get(key)]
    versions = [f"{name} {machine[name]}" for name in ("torch", "triton", "cupy")]
    measured = dict.fromkeys(row["process"] for row in found["rows"])  # a run that went on may have had others
    commits = dict.fromkeys(found["processes"][i]["commit"] for i in measured) or [process["commit"]]
    return (
        f"Measured {process['started'][:10]} at {', '.join(commits)} ({', '.join([*facts, *versions])}). Limits, measured in "
        f"the same process: copy {limits['copy'] / 1e12:.2f} TB/s, read {limits['read'] / 1e12:.2f} TB/s, matrix product "
        f"{limits['bfloat16'] / 1e12:.0f} TFLOP/s in bfloat16. Medians, cold cache; every row, with its quantiles, is in "
        f"`{where}/bench.json`."
    )


def _tests(path: pathlib.Path) -> str:
    """How the tests on the device ended, and which kernels they never ran in which dtypes."""
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    at = found["machine"]
    counts = ", ".join(f"{n:,} {_ENDED.get(what, what)}" for what, n in found["outcomes"].items())
    return (
        f"Tests on it, {at['date'][:10]} at {at['commit']}: {counts}. Kernels, each dtype counted: {len(found['reached'])} ran; "
        f"never: {in_words(found['never'])}."
    )


_ENDED = {"started": "crashed", "again": "failed before"}


def _plain(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _table(rows: Sequence[Row], dtype: str) -> str:
    """A line an op: geometric means over its cases, errors beside speeds."""
    lines = [
        f"| op, {dtype} | cases | of limit, forward | of limit, backward | × torch | × torch.compile | × best other | error, ulp |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for op in dict.fromkeys(r["op"] for r in rows):
        lines.append(_line(op, [r for r in rows if r["op"] == op]))
    lines.append(_line("**geometric mean**", rows))
    lines += [
        "",
        f"Geometric means. Shares are of the cases whose limit is {plots.LAUNCH_US:.0f} µs or more: smaller ones are bound by "
        "their launch. × is how many times longer the other takes, forward and backward together; below 1 it is faster.",
    ]
    return "\n".join(lines)


def _line(name: str, rows: Sequence[Row]) -> str:
    pairs = plots.best(rows)
    mine = [m for m, _ in pairs.values() if m]
    bound = [m for m in mine if plots.bandwidth_bound(m)]
    shares = [_percent(m["share"] for m in bound if m["direction"] == d) for d in ("forward", "backward")]
    last = {
        k: v for k, v in pairs.items() if k[3] == ("both" if any(m["direction"] == "both" for m in mine) else "forward")
    }
    against = [_times(_ratios(last, rows, other)) for other in ("torch", "torch.compile", "")]
    ulps = [m["ulp"] for m in mine if m["ulp"] is not None]
    cells = [name, len({call(m)[:3] for m in mine}), *shares, *against, f"{max(ulps):.2g}" if ulps else "–"]
    return f"| {' | '.join(map(str, cells))} |"


def _ratios(pairs: dict[tuple, tuple], rows: Sequence[Row], other: str) -> list[float]:
    """How many times longer the other (the best, if none is named) takes than ours, case by case."""
    named = {call(r): r for r in rows if r["us"] is not None and r["provider"] == other}
    both = [(mine, named.get(k) if other else theirs) for k, (mine, theirs) in pairs.items()]
    return [theirs["us"]["p50"] / mine["us"]["p50"] for mine, theirs in both if mine and theirs]


def _percent(values: Iterable[float | None]) -> str:
    found = [v for v in values if v]
    return f"{geometric_mean(found):.0%}" if found else "–"


def _times(ratios: Sequence[float]) -> str:
    return f"{geometric_mean(ratios):.2f}" if ratios else "–"


def _slow(rows: Sequence[Row], reasons: dict[str, str]) -> str:
    """Ours below 70 % of their limit, each with its reason."""
    mine = [m for m, _ in plots.best(filter(plots.bandwidth_bound, rows)).values() if m]
    mine = [m for m in mine if (m["share"] or 0) < LOW and m["direction"] != "both"]
    if not mine:
        return ""
    lines = [
        f"Below {LOW:.0%} of their limit:",
        "",
        "| op | case | direction | of limit | why |",
        "|---|---|---|---|---|",
    ]
    for m in mine:
        why = reasons.get(f"{m['op']}: {m['case']}") or reasons.get(m["op"]) or "not known"
        lines.append(f"| {m['op']} | {m['case']} | {m['direction']} | {m['share']:.0%} | {why} |")
    return "\n".join(lines)


def _written(rows: Sequence[Row]) -> str:
    """The kernels that gl.fuse wrote, beside those written by hand."""
    if not (cells := against.lines(rows)):
        return ""
    return f"Written by gl.fuse:\n\n{tables.markdown(against.HEAD, cells)}"


def _without(rows: Sequence[Row]) -> str:
    """What failed, in words: no speed is given for it."""
    bad = [r for r in rows if failed(r)]
    if not bad:
        return ""
    listed = "; ".join(
        f"{r['op']} ({r['case']}, {r['dtype']}, {r['direction']}) by {r['provider']}: {r['status']}" for r in bad
    )
    return f"No speed is given for what failed: {listed}."


# --- the page --------------------------------------------------------------------------------------------------------


def between(text: str, mark: str) -> str:
    """What stands between <!-- mark --> and <!-- /mark -->."""
    return text.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0].strip()


def replaced(text: str, found: dict[str, str]) -> str:
    """The text with these blocks between their marks."""
    for mark, block in found.items():
        before, rest = text.split(f"<!-- {mark} -->")
        _, after = rest.split(f"<!-- /{mark} -->")
        text = f"{before}<!-- {mark} -->\n{block}\n<!-- /{mark} -->{after}"
    return text


def add(folder: pathlib.Path, results: pathlib.Path = RESULTS) -> pathlib.Path:
    """Take a run's results in, under its GPU's name, with their plots. Raises ValueError for a broken file."""
    target = None
    if (folder / "models.json").exists():
        whole = json.loads((folder / "models.json").read_text())
        target = results / (slug(whole["about"]["device"]) if "arch" in whole["about"] else "cpu")
        write_json(target / "models.json", whole)
        models.draw(whole, target / "models.png")
    if target is None or (folder / "bench.json").exists():
        found = load(folder / "bench.json")
        if not found["rows"]:
            raise ValueError(f"{folder / 'bench.json'}: nothing was measured")
        target = results / slug(str(found["processes"][-1]["about"]["device"]))
        write_json(target / "bench.json", found)
        plots.write(found, target)
    if (folder / "tests.json").exists():
        shutil.copy(folder / "tests.json", target)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=pathlib.Path, help="folder with a run's bench.json")
    options = parser.parse_args()
    if options.add:
        try:
            print(f"written: {add(options.add)}")
        except (ValueError, OSError, RuntimeError) as error:  # not a run's folder, a broken file, no matplotlib
            print(f"report: {error}", file=sys.stderr)
            return 1
    page = ROOT / "docs/performance.md"
    before = page.read_text(encoding="utf-8")
    page.write_text(replaced(before, blocks()), encoding="utf-8")
    print(f"{page.name} is up to date" if page.read_text(encoding="utf-8") == before else f"{page.name} was written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
