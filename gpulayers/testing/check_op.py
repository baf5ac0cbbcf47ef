"""``check_op``: holds every backend of an op against its definition in float64, and the definition against itself."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import product
from typing import Any

import numpy as np

from gpulayers import arrays, dispatch
from gpulayers.arrays import FLOATS, Spec, compute_dtype, float32, float64
from gpulayers.ops._op import Op
from gpulayers.testing import cupy_like
from gpulayers.testing._repeats import remembered
from gpulayers.testing.arena import BACKENDS, Arena, arena, copy_with_strides
from gpulayers.testing.report import CheckError
from gpulayers.testing.tolerance import Limits, excess

held: set[tuple[str, str, str]] = set()
"""(op, backend, dtype) of every call that this process checked to its end."""


def check_op(
    op: Op,
    *inputs: Any,
    needs: Sequence[str] | None = None,
    backends: Sequence[str] = BACKENDS,
    dtypes: Sequence[Any] = FLOATS,
    numeric: bool = False,
    dys: Sequence[str] | None = None,
    joined: bool = False,
    seed: int = 0,
    **options: Any,
) -> list[str]:
    """Check one call of ``op``, forward and backward; returns the backends that served it.

    inputs: NumPy arrays, lists of them, or None. float64 arrays are cast to each of ``dtypes``; others stay as they are.
    needs: inputs whose gradients are checked; default: every differentiable floating-point input that came.
    backends: a backend named here that refuses the call for a reason of its own is an error, except under the default.
    numeric: also hold the definition's gradients against finite differences (slow: small inputs only).
    dys: kinds of dy, of "dense", "strided", "gapped", "transposed", "expanded" and "zero". Default: all but "gapped" (which
    tells launchers that read rows in place from those that copy) in float32, "dense" and one more in each other dtype.

    joined: an op that ``joins`` gradients of an input is given another one of it.

    Raises CheckError.
    """
    random = np.random.default_rng([seed, zlib.crc32(op.name.encode())])
    if needs is None:
        needs = [n for n, x in zip(op.inputs, inputs) if n in op.differentiable and _is_float(x)]
    kinds = tuple(dys or ("dense", "strided", "transposed", "expanded", "zero"))
    if numeric and needs:
        _check_numerically(op, inputs, tuple(needs), options, random)
    served = []
    dtypes = list(map(arrays.dtype, dtypes))
    thorough = float32 if float32 in dtypes else dtypes[0]
    on_cupys = {thorough, dtypes[zlib.crc32(repr([inputs, options]).encode()) % len(dtypes)]}
    for i, dtype in enumerate(dtypes):
        typed = [_cast(x, dtype) for x in inputs]
        case = _Case(op, typed, tuple(needs), options, random, kinds, joined)
        case.turn = None if dtype == thorough else i
        if dys is None and dtype != float32:  # what dys differ in, beside their values, is memory
            case.kinds = _first_and_another(case.kinds, i)
        for backend in backends:
            if dtype == float64 and backend in ("triton", "cuda"):
                continue  # left to the definition
            if backends is BACKENDS and case.refusal(backend) is not None:
                continue
            case.check(backend, arena(backend))
            new = (op.name, str(dtype)) not in cupy_like.ran
            if backend == "definition" and (new or dtype in on_cupys) and dispatch.installed("cuda"):
                case.check(backend, cupy_like.room())
                cupy_like.ran.add((op.name, str(dtype)))
            served.append(backend)
            held.add((op.name, backend, str(dtype)))
    return sorted(set(served))


class _Case:
    """One call with given inputs, and the truth about it."""

    turn: int | None = None
    """Of a call that is checked in float32, too: without a GPU, what hangs on no dtype is left to that, or done in turns."""

    def __init__(
        self, op: Op, inputs: list, needs: tuple, options: dict, random: np.random.Generator, kinds: tuple, joined: bool
    ):
        self.op, self.inputs, self.needs, self.options = op, inputs, needs, options
        self.terms = ""
        fixed = {k: v for k, v in (op.options | options).items() if k not in op.dynamic}
        padded = [*inputs, *[None] * (len(op.inputs) - len(inputs))]
        self.rule = op.rule(*map(arrays.spec, padded), needs=needs, **fixed)
        self.truth = _Reference(self, float64)
        self.plain = self.truth if self._is_double() else _Reference(self, None)
        outputs = [*self.rule.outputs.values()]
        self.kinds = _kinds(kinds, outputs)
        if joined:
            outputs.append(arrays.spec(inputs[op.inputs.index(op.joins)]))
        self.wanted: dict[tuple, list[list]] = {}
        self.limits: Limits = {}
        self.dys = {k: tuple(_dy(k, o, random) if _floats(o.dtype) else None for o in outputs) for k in self.kinds}

    def _is_double(self) -> bool:
        """Whether the plain formula computes what the truth does."""
        given = [x.dtype for x in arrays.lists(self.inputs)]
        found = [s.dtype for s in arrays.lists([*self.rule.outputs.values(), *self.rule.saved.values()])]
        return all(dtype == float64 for dtype in given + found if _floats(dtype))

    def refusal(self, backend: str) -> str | None:
        """Why the backend does not serve this call; None if it does."""
        if backend != "definition":
            module = dispatch.kernels(backend, self.op) if dispatch.installed(backend) else None
            if not hasattr(module, f"{self.op.name}_forward"):
                return "no kernel"
        with arena(backend) as room:
            try:
                dispatch.explain(self.op, *room.put(self.inputs), needs=self.needs, **self.options)
            except dispatch.Refused as refused:
                return str(refused)
        return None

    def fail(self, backend: str, what: str) -> None:
        came = ", ".join(_describe(x) for x in self.inputs)
        place = f"{backend}{self.terms}"
        raise CheckError(f"{self.op.name} on {place} ({came}; {self.options or 'no options'}): {what}")

    def check(self, backend: str, where: AbstractContextManager[Arena]) -> None:
        with where as room, remembered():
            self.terms = " on CuPy's terms" if room.library == "cupy_like" else ""
            given = room.put(self.inputs)
            before = [_bytes(room.get(x)) for x in given]
            outputs, call = dispatch.forward(self.op, given, self.needs, self.options)
            ran = dispatch.explain(self.op, *given, needs=self.needs, **self.options)[0]
            if ran != backend:
                self.fail(backend, f"{ran} computed it")
            self._check_outputs(backend, room, given, outputs, call)
            self._check_inputs(backend, room, given, before)
            if call is not None and self.op.backward is not None:
                for kind in self.kinds[::2] if self.terms else self.kinds:
                    self._check_gradients(backend, room, call, kind)
                self._check_each_need(backend, room)
            self._check_again(backend, room, given, outputs)

    def _check_outputs(self, backend: str, room: Arena, given: list, outputs: tuple, call: Any) -> None:
        got = room.get(outputs)
        if len(got) != len(self.rule.outputs):
            self.fail(backend, f"{len(got)} outputs where the rule gives {len(self.rule.outputs)}")
        for i, (name, spec) in enumerate(self.rule.outputs.items()):
            self._check_spec(backend, f"output {name}", outputs[i], spec)
            self._compare(backend, f"output {name}", got[i], self.truth.outputs[i], self.plain.outputs[i])
        everything = arrays.lists(given)
        if not room.real and any(np.shares_memory(*map(room.get, pair)) for pair in product(outputs, everything)):
            self.fail(backend, "an output aliases an input")
        saved = call.saved if call is not None else {}
        if set(saved) != set(self.rule.saved):
            self.fail(backend, f"it saved {sorted(saved)} where the rule says {sorted(self.rule.saved)}")
        for name, spec in self.rule.saved.items():
            if name in self.op.inputs:
                continue
            self._check_spec(backend, f"saved {name}", saved[name], spec)
            self._compare(
                backend, f"saved {name}", room.get(saved[name]), self.truth.saved[name], self.plain.saved[name]
            )

    def _check_spec(self, backend: str, what: str, x: Any, spec: Spec) -> None:
        came = arrays.spec(x)
        wanted = Spec(spec.shape, spec.dtype, *arrays.layout(spec.shape, spec.strides))
        if came != wanted:
            self.fail(
                backend, f"{what} is {came} in order {came.order}, the rule says {wanted} in order {wanted.order}"
            )  # type: ignore[union-attr]

    def _compare(self, backend: str, what: str, got: Any, truth: Any, plain: Any, moved: Sequence = ()) -> None:
        if not _floats(got.dtype):
            if not np.array_equal(got, truth):
                self.fail(backend, f"{what} differs: {got} where {truth} is true")
            return
        if (wrong := excess(got, truth, plain, moved, self.limits)) is not None:
            self.fail(backend, f"{what}: {wrong}")

    def _check_inputs(self, backend: str, room: Arena, given: list, before: list) -> None:
        for name, x, old, true, plain in zip(self.op.inputs, given, before, self.truth.inputs, self.plain.inputs):
            if name not in self.op.updates:
                if _bytes(room.get(x)) != old:
                    self.fail(backend, f"it modified its input {name}")
                continue
            for i, (a, t, p) in enumerate(zip(arrays.lists([x]), arrays.lists([true]), arrays.lists([plain]))):
                self._compare(backend, f"updated {name}[{i}]", room.get(a), t, p.astype(arrays.library(a).dtype(a)))

    def _check_gradients(self, backend: str, room: Arena, call: Any, kind: str) -> None:
        dys = [room.put(dy) for dy in self.dys[kind]]
        before = [_bytes(room.get(dy)) for dy in dys], _bytes(list(room.get(call.saved).values()))
        grads = call.backward(*dys)
        if ([_bytes(room.get(dy)) for dy in dys], _bytes(list(room.get(call.saved).values()))) != before:
            self.fail(backend, f"backward changed its dys or what was saved ({kind} dy)")
        mine = room.get(call.saved)
        self._compare_gradients(backend, room, grads, kind, mine, f"{kind} dy")
        first = kind == self.kinds[0]
        if room.real or (first and self.turn is None):
            # Without a GPU nothing runs at the same time: what differs the second time differs with any dy and dtype.
            again = call.backward(*dys)
            if _bytes(room.get(list(again))) != _bytes(room.get(list(grads))):
                self.fail(backend, f"two backwards of the same call differ ({kind} dy): it is not deterministic")
        if first and backend != "definition":
            theirs = self.plain.own_saved  # this backward can follow the definition's forward
            other = dispatch.Call(call.plan, {k: room.put(v) for k, v in theirs.items()}, call.values)
            self._compare_gradients(backend, room, other.backward(*dys), kind, theirs, "after the definition's forward")

    def _compare_gradients(self, backend: str, room: Arena, grads: tuple, kind: str, saved: dict, when: str) -> None:
        """Against the definition's backward in float64, from the same dys and what the forward saved."""
        truth, plain, *moved = self._wanted(kind, saved, self.needs)
        if len(grads) != len(self.op.inputs):
            self.fail(backend, f"backward gave {len(grads)} gradients for {len(self.op.inputs)} inputs ({when})")
        for name, x, g, t, p, *m in zip(self.op.inputs, self.inputs, grads, truth, plain, *moved):
            if (g is not None) != (name in self.needs):
                self.fail(backend, f"the gradient of {name} is {'given' if g is not None else 'missing'} ({when})")
            for a, v, tt, pp, *mm in zip(*(arrays.lists([each]) for each in (g, x, t, p, *m))):
                spec = (self.rule.grads or {}).get(name) or arrays.spec(v).like()  # type: ignore[union-attr]
                self._check_spec(backend, f"gradient of {name} ({when})", a, spec)
                self._compare(backend, f"gradient of {name} ({when})", room.get(a), tt, pp, mm)

    def _wanted(self, kind: str, saved: dict, needs: tuple) -> list[list]:
        """The true gradients, the plain formula's, and thrice the plain formula's from dys that are a rounding away."""
        key = kind, needs, tuple((name, _key(x)) for name, x in saved.items())
        if key not in self.wanted:  # most backends save the same
            dys = self.dys[kind]
            moves = 3 if any(dy is not None and dy.any() for dy in dys) else 0  # zeros stay zeros
            moved = [[_moved(dy, seed) for dy in dys] for seed in range(moves)]
            self.wanted[key] = [
                self.truth.gradients(dys, saved, needs),
                *(self.plain.gradients(d, saved, needs) for d in (dys, *moved)),
            ]
        return self.wanted[key]

    def _check_each_need(self, backend: str, room: Arena) -> None:
        """Each gradient alone is the gradient among others."""
        if len(self.needs) < 2:
            return
        kind = self.kinds[0]
        names = self.needs
        if self.turn is not None and not room.real:
            names = (names[self.turn % len(names)],)
        for name in names:
            _, call = dispatch.forward(self.op, room.put(self.inputs), (name,), self.options)
            assert call is not None
            grads = call.backward(*[room.put(dy) for dy in self.dys[kind]])
            i = self.op.inputs.index(name)
            if [g is not None for g in grads] != [j == i for j in range(len(grads))]:
                self.fail(backend, f"needs=({name!r},) gave other gradients than that one")
            saved = room.get(call.saved)
            wanted = [[each[i]] for each in self._wanted(kind, saved, (name,))]
            for a, t, p, *m in zip(*map(arrays.lists, ([grads[i]], *wanted))):
                self._compare(backend, f"gradient of {name} alone", room.get(a), t, p, m)

    def _check_again(self, backend: str, room: Arena, given: list, outputs: tuple) -> None:
        """The same outputs and updates without needs, and the same bits the second time."""
        again, call = dispatch.forward(self.op, room.put(self.inputs), (), self.options)
        if call is not None:
            self.fail(backend, "it saved something though no gradient was needed")
        for i, (name, spec) in enumerate(self.rule.outputs.items()):
            if _floats(spec.dtype):
                self._compare(
                    backend,
                    f"output {name} without needs",
                    room.get(again[i]),
                    self.truth.outputs[i],
                    self.plain.outputs[i],
                )
        if self.turn is not None and not room.real:
            return
        fresh = room.put(self.inputs)
        twice, _ = dispatch.forward(self.op, fresh, self.needs, self.options)
        if _bytes(room.get([*twice, *fresh])) != _bytes(room.get([*outputs, *given])):
            self.fail(backend, "the same inputs gave other bits the second time: it is not deterministic")


class _Reference:
    """The definition computed in ``work`` (None: in the dtype it computes in, then rounded once to the call's; in the call's
    own, where an op rounds on its way)."""

    def __init__(self, case: _Case, work: np.dtype | None):
        self.case, self.work = case, work
        self.inputs = [self._in(x, copy=True) for x in case.inputs]
        options = case.op.options | case.options
        fixed = options if case.rule.options is None else case.rule.options | {k: options[k] for k in case.op.dynamic}
        self.options = fixed
        with np.errstate(all="ignore"):
            outputs, saved = case.op.forward(*self.inputs, needs=case.needs, **fixed)
            if case.op.adds:
                outputs, saved = self._from_rounded_sum(outputs, saved)
        self.outputs = [self._out(o, s.dtype) for o, s in zip(outputs, case.rule.outputs.values())]
        self.saved = {k: self._out(v, case.rule.saved[k].dtype) for k, v in saved.items()}

    def _from_rounded_sum(self, outputs: tuple, saved: dict) -> tuple[tuple, dict]:
        """All but the sum, from the sum in the call's dtype."""
        case, names = self.case, [*self.case.rule.outputs]
        total = outputs[names.index(case.op.adds)]
        dtype = case.rule.outputs[case.op.adds].dtype
        rounded = total.astype(compute_dtype(dtype)).astype(dtype).astype(total.dtype)
        others, again = case.op.forward(
            rounded, np.zeros_like(rounded), *self.inputs[2:], needs=case.needs, **self.options
        )
        outputs = tuple(total if name == case.op.adds else y for name, y in zip(names, others))
        return outputs, again | {case.op.adds: total} if case.op.adds in saved else again

    def _in(self, x: Any, copy: bool = False) -> Any:
        if x is None:
            return None
        if isinstance(x, list):
            return [self._in(a, copy) for a in x]
        if not _floats(x.dtype):
            return x.copy() if copy else x
        work = self.work or (x.dtype if self.case.op.rounds else compute_dtype(x.dtype))
        return x.astype(work, copy=True) if copy else x.astype(work)

    def _out(self, x: Any, dtype: np.dtype) -> Any:
        if self.work is not None or not _floats(x.dtype):
            return x
        with np.errstate(over="ignore"):
            return x.astype(dtype)

    @functools.cached_property
    def own_saved(self) -> dict:
        """What the definition saves for the call as it came (in the call's own dtypes)."""
        case = self.case
        _, saved = case.op.forward(*[_copy(x) for x in case.inputs], needs=case.needs, **self.options)
        return saved

    def gradients(self, dys: Sequence, saved: dict, needs: tuple | None = None) -> list:
        case = self.case
        specs = tuple(arrays.spec(x) for x in [*self.inputs, *[None] * (len(case.op.inputs) - len(self.inputs))])
        given = tuple(self._in(dy) for dy in dys), {k: self._in(v) for k, v in saved.items()}
        needs = case.needs if needs is None else needs
        with np.errstate(all="ignore"):
            grads = case.op.backward(*given, inputs=specs, needs=needs, **self.options)  # type: ignore[misc]
        padded = [*case.inputs, *[None] * (len(grads) - len(case.inputs))]
        return [
            None
            if g is None
            else [self._out(a, v.dtype) for a, v in zip(g, x)]
            if isinstance(g, list | tuple)
            else self._out(g, x.dtype)
            for g, x in zip(grads, padded)
        ]


def _check_numerically(op: Op, inputs: Sequence, needs: tuple, options: dict, random: np.random.Generator) -> None:
    """The definition's gradients against central differences, in float64."""
    inputs = [_cast(x, float64) for x in inputs]
    with dispatch.only("definition"):
        outputs, call = dispatch.forward(op, inputs, needs, options)
        dys = [random.standard_normal(o.shape) if _floats(o.dtype) else None for o in outputs]
        grads = call.backward(*dys)  # type: ignore[union-attr]

        def value() -> float:
            again, _ = dispatch.forward(op, inputs, (), options)
            return sum(float((o * dy).sum()) for o, dy in zip(again, dys) if dy is not None)

        for name, x, g in zip(op.inputs, inputs, grads):
            if name not in needs:
                continue
            for a, ga in zip(arrays.lists([x]), arrays.lists([g])):
                _compare_numerically(op, name, a, ga, value)


def _compare_numerically(op: Op, name: str, x: np.ndarray, grad: np.ndarray, value: Any, step: float = 1e-6) -> None:
    for at in np.ndindex(x.shape):
        old = x[at]
        x[at] = old + step
        up = value()
        x[at] = old - step
        down = value()
        x[at] = old
        slope = (up - down) / (2 * step)
        if not abs(slope - grad[at]) <= 1e-5 * max(1.0, abs(slope), abs(up) / 1e3):
            raise CheckError(
                f"{op.name}: the definition's gradient of {name} at {at} is {grad[at]:.9g}, finite differences give {slope:.9g}"
            )


# --- inputs and gradients of outputs ---------------------------------------------------------------------------------


def _kinds(kinds: tuple, outputs: Iterable[Spec]) -> tuple:
    """Those of ``kinds`` that differ in memory for arrays of these shapes."""
    most = max((len(o.shape) for o in outputs if _floats(o.dtype)), default=0)
    alike = ("strided", "gapped", "transposed", "expanded") if most == 0 else ("transposed",) if most == 1 else ()
    return kinds[:1] + tuple(k for k in kinds[1:] if k not in alike)


def _first_and_another(kinds: tuple, turn: int) -> tuple:
    first, *others = kinds
    return (first, others[turn % len(others)]) if others else kinds


def _dy(kind: str, out: Spec, random: np.random.Generator) -> np.ndarray:
    """A random gradient of an output, laid out in memory as ``kind`` says."""
    shape, dtype = out.shape, out.dtype
    if kind == "zero":
        return np.zeros(shape, dtype)
    if kind == "expanded" or not shape:
        return np.broadcast_to(random.standard_normal(()).astype(dtype), shape)
    if kind == "strided":
        wide = random.standard_normal((*shape[:-1], 2 * shape[-1])).astype(dtype)
        return wide[..., ::2]
    if kind == "gapped" and len(shape) > 1:  # neighbours within a row, and a gap before the next
        return random.standard_normal((*shape[:-1], shape[-1] + 3)).astype(dtype)[..., : shape[-1]]
    if kind == "transposed":
        return random.standard_normal(shape[::-1]).astype(dtype).T
    return arrays.arranged(random.standard_normal(shape).astype(dtype), out.order)  # as the output itself lies


def _moved(dy: np.ndarray | None, seed: int) -> np.ndarray | None:
    """``dy`` with each element one rounding of its compute dtype up or down; mostly up, or a mean would not see it."""
    if dy is None:
        return None
    work = compute_dtype(dy.dtype)
    return (dy.astype(work) * _roundings(dy.shape, work, seed)).astype(work)


@functools.lru_cache(64)
def _roundings(shape: tuple[int, ...], work: np.dtype, seed: int) -> np.ndarray:
    """1 and a rounding more or less, for each element."""
    random = np.random.default_rng([math.prod(shape), seed])
    return 1 + random.choice([-1, 1, 1, 1], shape) * np.finfo(work).eps


def _cast(x: Any, dtype: np.dtype) -> Any:
    if isinstance(x, list | tuple):
        return [_cast(a, dtype) for a in x]
    if x is None or x.dtype != float64:
        return x
    return copy_with_strides(x, dtype)


def _copy(x: Any) -> Any:
    """A copy with the same strides: what is saved of an input has the input's layout."""
    return [_copy(a) for a in x] if isinstance(x, list) else None if x is None else copy_with_strides(x)


def _floats(dtype: np.dtype) -> bool:
    return dtype in FLOATS


def _is_float(x: Any) -> bool:
    flat = arrays.lists([x])
    return bool(flat) and all(_floats(a.dtype) for a in flat)


def _bytes(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return [_bytes(a) for a in x]
    return None if x is None else np.ascontiguousarray(x).tobytes()


def _key(x: Any) -> Any:
    """What tells arrays of other values from these."""
    return (
        tuple(map(_key, x)) if isinstance(x, list | tuple) else None if x is None else (x.dtype, x.shape, x.tobytes())
    )


def _describe(x: Any) -> str:
    if isinstance(x, list):
        return f"[{len(x)} arrays]"
    return "None" if x is None else f"{x.dtype}{list(x.shape)}"
