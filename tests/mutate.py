"""Seeds random faults in kernels, one at a time, and prints which the tests do not notice.

    python tests/mutate.py [--count 200] [--seed 1] [--family pooling …] [--kind narrow …] [--only ID …]
    python tests/mutate.py --kept sample|reported

Results are kept in `.cache/mutation`: a run that was cut off goes on, and what survived is tried again when tests changed.
No library for mutation testing changes CUDA C++, or knows masks, accumulators and index widths; so the faults are made here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from mutation import mutant as mutants
from mutation import reach, running
from mutation.mutant import Mutant
from tqdm import tqdm

KEPT = running.ROOT / ".cache/mutation"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="faults to seed")
    parser.add_argument("--seed", type=int, default=1, help="which ones")
    parser.add_argument("--family", nargs="*", default=[], help="families whose kernels get them; all by default")
    parser.add_argument("--kind", nargs="*", default=[], help="kinds of faults, as narrow; all by default")
    parser.add_argument("--only", nargs="*", default=[], help="ids of faults of this seed")
    parser.add_argument("--limit", type=float, default=300, help="seconds that the tests of one fault may take")
    parser.add_argument(
        "--kept", choices=("sample", "reported"), help="those of mutation/, on the test that noticed each"
    )
    parser.add_argument("--list", action="store_true", help="print the faults and run nothing")
    chosen = parser.parse_args()
    if chosen.kept:
        return report(of_list(chosen.kept, chosen.limit), chosen.kept)
    drawn = mutants.draw(1 << 30 if chosen.only else chosen.count, chosen.seed, chosen.family, chosen.kind)
    if chosen.only:
        drawn = [m for m in drawn if m.name(chosen.seed) in chosen.only]
    if chosen.list:
        for m in drawn:
            print(f"{m.name(chosen.seed)}\n{m.diff()}\n")
        return 0
    return report(seeded(drawn, chosen.seed, chosen.limit), chosen.seed)


def seeded(drawn: list[Mutant], seed: int, limit: float) -> list[tuple[Mutant, dict[str, Any]]]:
    """Each fault with its result: {"by": the test that noticed it, or None, "seconds": …}."""
    running.prepare()
    tqdm.monitor_interval = 0  # its thread would be forked
    KEPT.mkdir(parents=True, exist_ok=True)
    tests = _of_tests()
    results, known = [], _known()
    with running.copied() as tree, (KEPT / "results.jsonl").open("a") as file:
        reached = reach.Reach(KEPT / "reach", tree)
        for m in (bar := tqdm(drawn, desc="faults", unit="fault", disable=None)):
            key = hashlib.sha256(f"{m.file}\0".encode() + m.applied()).hexdigest()[:16]
            result = {"by": None, "seconds": 0.0, "tried": 0, "tests": tests} if m.equal else known.get(key)
            if result is None or (result["by"] is None and result["tests"] != tests):
                result = {"key": key, "id": m.name(seed), "tests": tests} | tried(m, tree, reached, limit)
                file.write(json.dumps(result) + "\n")
                file.flush()
            results.append((m, result))
            bar.set_postfix(survived=len(_survived(results)))
    return results


def of_list(name: str, limit: float) -> list[tuple[Mutant, dict[str, Any]]]:
    """A committed list, each fault on the one test that is known to notice it."""
    running.prepare()
    results = []
    with running.copied() as tree:
        for m, test in tqdm(mutants.kept(name), desc="faults", unit="fault", disable=None):
            began = time.perf_counter()
            with running.changed(tree, m.file, m.applied()):
                by = running.run(tree, [test], limit)["by"]
            results.append((m, {"by": by, "tried": 1, "seconds": round(time.perf_counter() - began, 1)}))
    return results


def tried(m: Mutant, tree: Path, reached: reach.Reach, limit: float) -> dict[str, Any]:
    """One fault's result: what noticed it, of how many tests, in how many seconds."""
    began, by, count = time.perf_counter(), None, 0
    for tests in reached.tests(m):
        with running.changed(tree, m.file, m.applied()):
            by = running.run(tree, tests, limit)["by"]
        count += len(tests)
        if by:
            break
    return {"by": by, "tried": count, "seconds": round(time.perf_counter() - began, 1)}


def _known() -> dict[str, dict]:
    path = KEPT / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {result["key"]: result for result in map(json.loads, lines)}


def _of_tests() -> str:
    """What the tests are made of, in short."""
    paths = [*(running.ROOT / "tests").glob("test_*.py"), *(running.ROOT / "gpulayers/testing").glob("*")]
    texts = [p.read_bytes() for p in sorted(paths) if p.is_file()]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:12]


def _survived(results: list[tuple[Mutant, dict[str, Any]]]) -> list[tuple[Mutant, dict[str, Any]]]:
    return [(m, result) for m, result in results if result["by"] is None and not m.equal]


def report(results: list[tuple[Mutant, dict[str, Any]]], seed: int | str) -> int:
    """Print the table and the survivors; the number of survivors."""
    for m, result in results:
        by = result["by"] or ("changes nothing" if m.equal else "NOT NOTICED")
        print(f"{m.name(seed):55} {by:90} {result['seconds']:6.1f} s")
    survived = _survived(results)
    for m, result in survived:
        print(f"\nnot noticed: {m.name(seed)} ({result['tried']} tests)\n{m.diff()}")
    changing = [m for m, _ in results if not m.equal]
    print(f"\n{len(changing) - len(survived)} of {len(changing)} faults noticed ({seed})")
    print(f"{len(results) - len(changing)} more change nothing: tests/mutation/equal.toml says why of each")
    return len(survived)


if __name__ == "__main__":
    sys.exit(bool(main()))
