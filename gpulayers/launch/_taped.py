"""A plan's functions with their tapes: what has been called before is played, all else is launched, and noted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpulayers import transfer
from gpulayers.arrays import Library
from gpulayers.launch import _settings, _tape
from gpulayers.launch._place import place
from gpulayers.launch._record import UNTAPED, Recorder, Untapeable, hooks_of_triton
from gpulayers.launch._watch import Busy

MOST_TAPES = 4
"""Of one kind of call: for addresses that 16 divides, and for those that it does not."""
MOST_KINDS = 8
"""Of one plan's direction: values of options that change from call to call, layouts of dy."""
MOST_TRIES = 6
"""Recordings of one kind before it is left alone."""


class Kind:
    """Calls that are alike in all but their arrays' addresses."""

    __slots__ = ("before", "play", "runs", "tapes", "tries", "why")

    def __init__(self) -> None:
        self.play: Callable = _nothing
        """(*arrays) → what the one tape that serves them gives; NotImplemented where none does."""
        self._put()
        self.runs = self.tries = 0
        self.before: _tape.Parts | None = None
        """The recording that waits for one like it."""
        self.why = ""
        """Why there will be none, or there is none yet."""

    def is_due(self) -> bool:
        """Whether the call at hand, which no tape serves, is to be recorded."""
        self.runs += 1
        return self.runs > 1 and self.tries < MOST_TRIES and sum(t.is_current() for t in self.tapes) < MOST_TAPES

    def add(self, parts: _tape.Parts) -> None:
        """A recording: the second of a pair of equals becomes a tape."""
        self.tries += 1
        before, self.before = self.before, parts
        if before is None or before.sameness != parts.sameness:
            self.why = UNTAPED["differs"] if self.tries == MOST_TRIES else ""
            return
        self._put(_tape.player()(*parts), *(t for t in self.tapes if t.is_current()))
        self.before, self.tries, self.why = None, 0, ""

    def _put(self, *tapes: Any) -> None:
        def any_of(*arrays: Any) -> Any:
            for tape in tapes:
                found = tape(*arrays)
                if found is not NotImplemented:
                    return found
            return NotImplemented

        self.tapes, self.play = tapes, tapes[0] if len(tapes) == 1 else any_of if tapes else _nothing

    def refuse(self, why: str) -> None:
        self.tries += 1
        self.why = why

    def state(self) -> str:
        """What ``explain`` says of such a call."""
        if not _settings.enabled:
            return f"not taped: {UNTAPED['off']}"
        if any(t.is_current() for t in self.tapes):
            return "taped"
        return f"not taped: {self.why}" if self.why else f"not taped yet: {_YET}"


def _nothing(*arrays: Any) -> Any:
    return NotImplemented


_YET = "a call is recorded the second and the third time"


def told(states: Iterable[str]) -> str:
    """Of several states, the one that says most."""
    return min(states, key=lambda state: (state != "taped", "yet" in state))


class _Taped:
    """One direction of a plan.

    launcher: the function that launches; bind: makes of such a function one of the caller's own arrays.
    varying: (**dynamic options) → a named tuple of the kernels' parameters that come with each call, for an op whose
    dynamic options have no other use.
    backend, home, device: whose function it is, and whose arrays they are. never: why no call of it is taped.
    """

    def __init__(
        self,
        launcher: Callable,
        bind: Callable[[Callable], Callable],
        backend: str,
        home: Library,
        device: str,
        never: str,
        varying: Callable[..., tuple] | None = None,
    ):
        self.varying = varying
        self.run, self.launcher, self.bind = bind(launcher), launcher, bind
        self.backend, self.home, self.device, self.never = backend, home, device, never
        self.kinds: dict[Any, Any] = {}

    def _launch(
        self,
        kind: Kind | None,
        given: Callable[..., Sequence[Any]],
        results: Callable,
        args: tuple,
        options: dict[str, Any],
    ) -> Any:
        """A call that no tape serves. given: the arrays among the launcher's arguments; results: those it gives."""
        if kind is None or self.never or not _settings.enabled or (same := watched(self.backend)) is None:
            return self.run(*args, **options)
        where = place(self.home, self.device)
        if where is None or not kind.is_due():
            return self.run(*args, **options)
        varying = () if self.varying is None else self.varying()._fields  # type: ignore[attr-defined]
        recorder, parts = Recorder(where, varying), list[_tape.Parts]()

        def spied(*args: Any, empty: Callable, **options: Any) -> Any:
            found = recorder.run(given(*args), lambda noted: self.launcher(*args, empty=noted, **options), empty)
            try:
                parts.append(recorder.parts(results(found), same))
            except Untapeable as why:
                kind.refuse(str(why))
            return found

        try:
            found = self.bind(spied)(*args, **options)
        except Busy:
            return self.run(*args, **options)
        for noted in parts:
            kind.add(noted)
        return found

    def _kinds(self) -> Iterable[Kind]:
        return self.kinds.values()

    def state(self) -> str:
        """What ``explain`` says of such calls."""
        if self.never:
            return f"not taped: {self.never}"
        states = [kind.state() for kind in self._kinds()] or [Kind().state()]
        return told(states)


class Forward(_Taped):
    """(*inputs, **dynamic options) → (outputs, what backward needs by name)."""

    def __init__(self, *how: Any, outputs: int, saved: Sequence[str], listed: bool):
        """listed: lists of arrays are among the inputs."""
        super().__init__(*how)
        self.outputs, self.saved, self.listed = outputs, tuple(saved), listed

    def kind(self, values: dict[str, Any]) -> Kind:
        """Of the calls with these dynamic options."""
        key = () if self.varying is not None else tuple(values.values())
        found = self.kinds.get(key)
        if found is None:
            found = Kind()
            if len(self.kinds) < MOST_KINDS:
                self.kinds[key] = found
        return found

    def __call__(self, *inputs: Any, **values: Any) -> tuple[tuple, dict]:
        kind, given = self.kind(values), _inputs(*inputs) if self.listed else inputs
        found = kind.play(*given) if self.varying is None else kind.play(*given, *self.varying(**values))
        if found is not NotImplemented:
            return found[: self.outputs], dict(zip(self.saved, found[self.outputs :]))
        return self._launch(kind, _inputs, self._results, inputs, values)

    def _results(self, found: tuple[tuple, dict]) -> tuple:
        outputs, saved = found
        return *outputs, *(saved[name] for name in self.saved)


class Backward(_Taped):
    """(dys, saved, *, needs, **dynamic options) → one gradient or None for each input."""

    def __call__(self, dys: Sequence[Any], saved: dict[str, Any], *, needs: tuple[str, ...], **values: Any) -> tuple:
        given = *dys, *saved.values()
        missing = tuple([x is None for x in given])
        present = tuple([x for x in given if x is not None]) if True in missing else given
        key = (needs, *saved, missing, *values.values())
        kinds = self.kinds.get(key, ())
        for check, kind in kinds:
            if check(*present):
                found = kind.play(*given)
                if found is not NotImplemented:
                    return found
                break
        else:
            kind = self._new(key, kinds, present)
        return self._launch(kind, _dys_and_saved, tuple, (dys, saved), {"needs": needs, **values})

    def alike(self, outputs: int, needs: tuple[str, ...], names: Sequence[str], values: dict[str, Any]) -> tuple:
        """(check of dys and what is saved by these names, kind) of each known layout of so many dys, none missing."""
        missing = (False,) * (outputs + len(names))
        return self.kinds.get((needs, *names, missing, *values.values()), ())

    def _kinds(self) -> Iterable[Kind]:
        return [kind for kinds in self.kinds.values() for _, kind in kinds]

    def _new(self, key: tuple, kinds: tuple, present: tuple) -> Kind | None:
        if len(kinds) == MOST_TAPES or (not kinds and len(self.kinds) == MOST_KINDS):
            return None
        kind = Kind()
        self.kinds[key] = (*kinds, (_checker(present), kind))
        return kind


def explained(plan: Any, plans: Iterable[Any]) -> dict[str, str]:
    """What became of calls like a plan's, of all that ``plans`` were made for: {direction: "taped", or why not}."""
    if not isinstance(plan.run_forward, Forward):
        return {}

    def alike(p: Any) -> bool:
        kind = ("op", "backend", "forward", "options", "inputs", "needs", "home", "device")
        return all(getattr(p, name) == getattr(plan, name) for name in kind)

    known = [plan, *filter(alike, plans)]
    found = {"forward": told(p.run_forward.state() for p in known)}
    return found | ({"backward": told(p.run_backward.state() for p in known)} if plan.needs else {})


def _inputs(*inputs: Any) -> tuple:
    """All arrays, those in lists in their place."""
    return tuple(a for x in inputs for a in (x if isinstance(x, list | tuple) else (x,)))


def _dys_and_saved(dys: Sequence[Any], saved: dict[str, Any]) -> tuple:
    return *dys, *saved.values()


def _checker(xs: Sequence[Any]) -> Callable[..., bool]:
    """Whether arrays have the metadata of these."""
    if xs and hasattr(xs[0], "data_ptr"):
        try:
            from torch._C._dynamo.guards import TensorGuards

            return TensorGuards(*xs, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        except (ImportError, TypeError):
            pass
    expected = tuple(map(_metadata, xs))
    return lambda *now: tuple(map(_metadata, now)) == expected


def _metadata(x: Any) -> tuple:
    strides = x.stride() if hasattr(x, "data_ptr") else x.strides
    return type(x), tuple(x.shape), strides, x.dtype, x.device


def watched(backend: str) -> tuple | None:
    """What a recording of a backend's launchers depends on besides metadata, as (dict, key, value, …); None where nothing
    is to be recorded: memory is filled with NaN, choices are listened to, kernels are emulated, hooks are in Triton."""
    if transfer._poison:
        return None
    found: list[tuple[dict, str]] = [
        (vars(_settings), "epoch"),
        (vars(_settings), "cpu_stream"),
        (vars(transfer), "_poison"),
    ]
    if backend == "triton":
        from triton import knobs

        from gpulayers.kernels.triton import _configs, _tile

        if _configs._asked is not None or any(hooks_of_triton()):
            return None
        found += [(vars(_tile), "pretend"), (vars(_configs), "version"), (vars(_configs), "_asked")]
        found += [(vars(knobs.runtime), "launch_enter_hook"), (vars(knobs.runtime), "launch_exit_hook")]
    else:
        from gpulayers.kernels.cuda import _launch

        if _launch.recording or _launch.emulate is not None:
            return None
        found += [(vars(_launch), "recording"), (vars(_launch), "emulate")]
    return tuple(part for d, key in found for part in (d, key, d.get(key)))
