"""What the lab writes: ``bench.json``, its schema, and how it stays whole when a process dies."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import pathlib
import platform
import re
import subprocess
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import gpulayers
from gpulayers._files import write_whole
from gpulayers.inventory import PACKAGES, version

SCHEMA = 1
ROOT = pathlib.Path(__file__).resolve().parents[2]
DEATHS = 2
"""A provider that killed this many processes on a case is not tried there again."""

Status = Literal["ok", "wrong", "impossible", "raised", "refused", "crashed"]


class Row(TypedDict):
    """One direction of one case by one provider. No time where its status is not "ok"."""

    family: str
    op: str
    case: str
    dtype: str
    direction: Literal["forward", "backward", "both"]
    provider: str
    ours: bool
    headline: bool
    sweep: str
    size: int
    status: Status
    reason: str
    us: dict[str, float] | None
    samples: int
    limit_us: float
    share: float | None
    bytes: int
    flops: int
    error: float | None
    ulp: float | None
    bound: float | None
    judge: str
    sets: int
    peak_bytes: int | None
    host_us: float | None
    process: int


class Process(TypedDict):
    """One process that measured rows: when it began, what the device was, and the limits measured then."""

    started: str
    commit: str
    about: dict[str, str | float | int | None]
    limits: dict[str, float]


class Results(TypedDict):
    schema: int
    machine: dict[str, str | None]
    processes: list[Process]
    rows: list[Row]
    deaths: dict[str, int]


class Job(NamedTuple):
    """What a row belongs to, without its direction."""

    family: str
    op: str
    case: str
    dtype: str
    provider: str

    def __str__(self) -> str:
        return " | ".join(self)


def job(row: Row) -> Job:
    return Job(*(row[name] for name in Job._fields))  # type: ignore[literal-required]


def failed(row: Row) -> bool:
    """Whether it fails a run: a wrong result, an impossible reading, or an error of ours."""
    return row["status"] in ("wrong", "impossible") or (row["ours"] and row["status"] in ("raised", "crashed"))


def machine() -> dict[str, str | None]:
    """What a result is worth nothing without: date, versions, commit, processor."""
    return {
        "date": now(),
        "python": platform.python_version(),
        "processor": processor(),
        "commit": commit(),
        "gpulayers": gpulayers.__version__,
        **{package: version(package) for package in (*PACKAGES, "liger_kernel")},
    }


def processor() -> str:
    """This CPU's name."""
    found = re.search(r"model name\s*:\s*(.+)", read_if_there("/proc/cpuinfo"))
    return found[1].strip() if found else platform.machine()


def read_if_there(path: str) -> str:
    there = pathlib.Path(path)
    return there.read_text() if there.exists() else ""


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def commit() -> str:
    """Of the checkout. Of a copy without git, or an installation, what its files are."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        found = done.stdout.strip() if (ROOT / ".git").exists() else ""  # an installation may lie in another's checkout
    except OSError:
        found = ""
    return found or f"source-{_digest()}"


@functools.cache
def _digest() -> str:
    """Of what is measured: equal for equal files, wherever they lie."""
    import gpulayers.kernels

    found = hashlib.sha256()
    for name, folder in (("gpulayers", gpulayers.__path__[0]), ("kernels", gpulayers.kernels.__path__[0])):
        for path in sorted(p for p in pathlib.Path(folder).rglob("*") if p.suffix in (".py", ".cu", ".cuh", ".json")):
            inside = path.relative_to(folder).as_posix()
            if name == "kernels" or not inside.startswith(("kernels/", "bench/")):
                found.update(f"{name}/{inside}\n".encode() + path.read_bytes())
    return found.hexdigest()[:8]


def slug(device: str) -> str:
    """A device's name as a folder's: "NVIDIA H100 80GB HBM3" → "h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia")).strip("-")


def write_json(path: pathlib.Path, value: Any) -> None:
    """Whole or not at all, whenever the process dies."""
    write_text(path, _lines(value) if isinstance(value, dict) else json.dumps(value))


def _lines(value: dict[str, Any]) -> str:
    """A line for each field, and for each item of a list: written again after each of a thousand cases, it must be quick."""

    def text(field: Any) -> str:
        if not isinstance(field, list):
            return json.dumps(field)
        return "[" + ",".join(f"\n  {json.dumps(item)}" for item in field) + "\n ]"

    return "{" + ",".join(f"\n {json.dumps(name)}: {text(field)}" for name, field in value.items()) + "\n}\n"


def write_text(path: pathlib.Path, text: str) -> None:
    """Whole or not at all, whenever the process dies."""
    write_whole(path, text.encode())


# --- the schema ------------------------------------------------------------------------------------------------------


def load(path: pathlib.Path) -> Results:
    """Results from a file. Raises ValueError that names the file and the field that is wrong."""
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the rule is JSON; got {error}") from None
    try:
        validate(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found


def validate(results: Any) -> None:
    """Raises ValueError naming the field, the rule and what came, if ``results`` are not Results."""
    _check("results", results, Results)
    if results["schema"] != SCHEMA:
        raise ValueError(f"schema: the rule is {SCHEMA}; got {results['schema']}")
    for i, row in enumerate(results["rows"]):
        if not 0 <= row["process"] < len(results["processes"]):
            raise ValueError(f"rows[{i}].process: the rule is an index of processes; got {row['process']}")
        if (row["us"] is None) == (row["status"] == "ok"):
            raise ValueError(f"rows[{i}].us: the rule is a time where status is ok, and only there; got {row['us']}")


def _check(field: str, value: Any, kind: Any) -> None:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if typing.is_typeddict(kind):
        wanted = typing.get_type_hints(kind)
        if not isinstance(value, dict) or value.keys() != wanted.keys():
            came = sorted(value.keys() ^ wanted.keys()) if isinstance(value, dict) else value
            raise ValueError(f"{field}: the rule is the fields of {kind.__name__}; got a difference in {came}")
        for name, of in wanted.items():
            _check(name if field == "results" else f"{field}.{name}", value[name], of)
    elif origin is list and isinstance(value, list):
        for i, item in enumerate(value):
            _check(f"{field}[{i}]", item, inside[0])
    elif origin is dict and isinstance(value, dict):
        for name, item in value.items():
            _check(f"{field}.{name}", item, inside[1])
    elif not _is(value, kind):
        raise ValueError(f"{field}: the rule is {_words(kind)}; got {value!r}")
    elif origin is types.UnionType and isinstance(value, dict):
        _check(field, value, next(k for k in inside if typing.get_origin(k) is dict))


def _is(value: Any, kind: Any) -> bool:
    """Whether it is of this kind, not looking inside."""
    origin = typing.get_origin(kind)
    if origin is types.UnionType:
        return any(_is(value, k) for k in typing.get_args(kind))
    if origin is Literal:
        return value in typing.get_args(kind)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, {float: (int, float)}.get(kind, origin or kind))


def _words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    return str(getattr(kind, "__name__", kind)) if isinstance(kind, type) else str(kind)


# --- the store -------------------------------------------------------------------------------------------------------


class Store:
    """Results on disk, whole at any moment.

    folder: of bench.json. resume: go on with what is there; else it is begun anew. A provider that was being measured
    when a process died is known by a small file beside; its deaths are counted.
    """

    def __init__(self, folder: pathlib.Path, resume: bool):
        self.path, self._trying = folder / "bench.json", folder / "trying.json"
        if resume and self.path.exists():
            self.results = load(self.path)
        else:
            self.results = Results(schema=SCHEMA, machine=machine(), processes=[], rows=[], deaths={})
        self._of: dict[Job, list[Row]] = {}
        for row in self.results["rows"]:
            self._of.setdefault(job(row), []).append(row)
        if not resume:
            self.rest()
        if self._trying.exists():
            died = str(Job(*json.loads(self._trying.read_text())))
            self.results["deaths"][died] = self.results["deaths"].get(died, 0) + 1
            write_json(self.path, self.results)
            self._trying.unlink()

    def begin(self, about: dict[str, Any], limits: dict[str, float]) -> int:
        """Note a process that measures; gives its index. ValueError if another device measured what is there."""
        for other in (p["about"].get("device") for p in self.results["processes"]):
            if other != (here := about.get("device")):
                raise ValueError(
                    f"{self.path} holds what {other} measured, and this is {here}: name another folder (--out)"
                )
        self.results["processes"].append(Process(started=now(), commit=commit(), about=about, limits=limits))
        write_json(self.path, self.results)
        return len(self.results["processes"]) - 1

    def trying(self, what: Job) -> None:
        """From here on, a death of the process is this job's."""
        write_json(self._trying, list(what))

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows, in place of older ones of the same jobs and directions."""
        for row in rows:
            there = self._of.setdefault(job(row), [])
            for older in [r for r in there if r["direction"] == row["direction"]]:
                there.remove(older)
                self.results["rows"].remove(older)
            there.append(row)
            self.results["rows"].append(row)
        write_json(self.path, self.results)
        self._trying.unlink(missing_ok=True)

    def rest(self) -> None:
        """Nothing is being tried."""
        self._trying.unlink(missing_ok=True)

    def of(self, what: Job) -> list[Row]:
        return list(self._of.get(what, ()))

    def deaths(self, what: Job) -> int:
        return self.results["deaths"].get(str(what), 0)
