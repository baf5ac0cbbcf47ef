"""Seeds random faults in kernels, one at a time, and prints which the tests do not notice.

    python tests/mutate.py [--count 200] [--seed 1] [--family pooling …] [--only ID …]
    python tests/mutate.py --sample

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
    parser.add_argument("--only", nargs="*", default=[], help="ids of faults of this seed")
    parser.add_argument("--limit", type=float, default=300, help="seconds that the tests of one fault may take")
    parser.add_argument(
        "--sample", action="store_true", help="those of mutation/sample.toml, on the test that noticed each"
    )
    parser.add_argument("--list", action="store_true", help="print the faults and run nothing")
    chosen = parser.parse_args()
    if chosen.sample:
        return report(sampled(chosen.limit), 1)
    drawn = mutants.draw(1 << 30 if chosen.only else chosen.count, chosen.seed, chosen.family)
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
            result = known.get(key)
            if result is None or (result["by"] is None and result["tests"] != tests):
                result = {"key": key, "id": m.name(seed), "tests": tests} | tried(m, tree, reached, limit)
                file.write(json.dumps(result) + "\n")
                file.flush()
            results.append((m, result))
            bar.set_postfix(survived=sum(r["by"] is None for _, r in results))
    return results


def sampled(limit: float) -> list[tuple[Mutant, dict[str, Any]]]:
    """The committed sample, each on the one test that is known to notice it."""
    running.prepare()
    results = []
    with running.copied() as tree:
        for m, test in mutants.sample():
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


def report(results: list[tuple[Mutant, dict[str, Any]]], seed: int) -> int:
    """Print the table and the survivors; the number of survivors."""
    for m, result in results:
        print(f"{m.name(seed):55} {result['by'] or 'NOT NOTICED':90} {result['seconds']:6.1f} s")
    survived = [(m, result) for m, result in results if result["by"] is None]
    for m, result in survived:
        print(f"\nnot noticed: {m.name(seed)} ({result['tried']} tests)\n{m.diff()}")
    print(f"\n{len(results) - len(survived)} of {len(results)} faults noticed (seed {seed})")
    print(f"{len(mutants.equal())} are known to change nothing (tests/mutation/equal.toml), and are not seeded")
    return len(survived)


if __name__ == "__main__":
    sys.exit(bool(main()))
