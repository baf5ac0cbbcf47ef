"""The only place that chooses who computes.

An array's home decides: CPU arrays go to ``kernels/numpy`` where it serves the call (torch's tensors first to
``kernels/aten``), else to the definition; CUDA arrays go to a Triton or CUDA kernel, else to the definition on CuPy. The
result lives where the input lived.

Each distinct call (op, shapes, dtypes, strides, options, policy) is planned once; a plan holds the functions that
compute it, forward and backward, so a repeated call costs a dictionary look-up.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpulayers import arrays, launch
from gpulayers._policy import Policy as Policy
from gpulayers._policy import Refused as Refused
from gpulayers._policy import _policy as _policy
from gpulayers._policy import batch_invariant as batch_invariant
from gpulayers._policy import only as only
from gpulayers._policy import permitted as permitted
from gpulayers._policy import policy as policy
from gpulayers._policy import sms as sms
from gpulayers._policy import strict as strict
from gpulayers.arrays import NUMPY, TORCH, Library, Spec
from gpulayers.definition import Definition, Rule
from gpulayers.kernels import _invariance, _multiprocessors
from gpulayers.transfer import Bridge

log = logging.getLogger("gpulayers")

KERNELS = {"triton": ("triton", "torch"), "cuda": ("cupy",), "aten": ("torch",), "numpy": ()}
"""Backends with kernels, and the packages that each needs."""
ON_CPU = ("aten", "numpy")


class Plan(NamedTuple):
    """Who computes one kind of call, and what it yields."""

    op: Definition
    backend: str
    forward: Callable
    backward: Callable | None
    options: dict[str, Any]
    inputs: tuple
    rule: Rule
    needs: tuple[str, ...]
    bridge: Bridge | None
    """None for NumPy arrays and a NumPy function: nothing to convert, nothing to allocate for it."""
    home: Library
    device: str
    reasons: dict[str, str]
    """Why each backend that stood before the chosen one did not serve the call."""
    run_forward: Callable
    """(*inputs, **dynamic options) → (outputs, what backward needs by name): the caller's own arrays."""
    run_backward: Callable
    """(dys, saved, *, needs, **dynamic options) → one gradient for each input, None where ``needs`` does not name it."""

    def bound(self) -> Plan:
        """This plan for the functions it names: they get all that the plan fixes, and arrays that they can take."""
        backward: Callable = self.backward or _no_backward
        if self.backend not in ("triton", "cuda") or self.home is NUMPY:
            return self._replace(run_forward=self._forward(self.forward), run_backward=self._backward(backward))
        never = "own_cuda" if self.backend == "cuda" and "cuda" in self.op.kernels else ""
        varying = getattr(kernels(self.backend, self.op), f"{self.op.name}_varying", None)
        varying = varying and functools.partial(varying, **self.options)
        where = self.backend, self.home, self.device, launch.UNTAPED.get(never, "")
        saved, listed = tuple(self.rule.saved) if self.needs else (), any(isinstance(s, list) for s in self.inputs)
        forward = launch.Forward(
            self.forward, self._forward, *where, varying, outputs=len(self.rule.outputs), saved=saved, listed=listed
        )
        return self._replace(run_forward=forward, run_backward=launch.Backward(backward, self._backward, *where))

    def _fixed(self) -> dict[str, Any]:
        return self.options | ({} if self.bridge is None else self.bridge.extra)

    def _forward(self, function: Callable) -> Callable:
        """A forward of the backend's arrays as one of the caller's."""
        forward: Callable = functools.partial(function, needs=self.needs, **self._fixed())
        if self.bridge is None or self.bridge.open:
            return forward
        return self.bridge.around_forward(forward, self.op, tuple(self.rule.outputs))

    def _backward(self, function: Callable) -> Callable:
        backward: Callable = functools.partial(function, inputs=self.inputs, **self._fixed())
        return backward if self.bridge is None or self.bridge.open else self.bridge.around_backward(backward)


def _no_backward(*args: Any, **options: Any) -> Any:
    raise RuntimeError("an op that only updates has no backward")


class Call:
    """One recorded call of an op: what its backward needs."""

    __slots__ = ("plan", "saved", "values")

    def __init__(self, plan: Plan, saved: dict[str, Any], values: dict[str, Any]):
        self.plan, self.saved, self.values = plan, saved, values

    def backward(self, *dys: Any) -> tuple:
        """One gradient for each input, None where it was not needed. ``dys``: one for each output, None if unused; and for
        an op that ``joins`` its gradient to others of that input, their sum.

        May be called again: neither ``dys`` nor what was saved is changed. Raises RuntimeError if a gradient's shape
        or dtype is not its output's.
        """
        plan = self.plan
        if plan.backward is None:
            why = f"it only updates {', '.join(plan.op.updates)}" if plan.op.updates else "it is for inference"
            raise RuntimeError(f"{plan.op.name}: it has no backward, {why}")
        joined = plan.op.joins if len(dys) > len(plan.rule.outputs) else ""
        if len(dys) != len(plan.rule.outputs) + bool(joined):
            raise RuntimeError(f"{plan.op.name}: backward takes one dy for each output: {', '.join(plan.rule.outputs)}")
        used, expected = False, [*plan.rule.outputs.items()]
        if joined:
            expected.append((joined, plan.inputs[plan.op.inputs.index(joined)]))
        for dy, (name, out) in zip(dys, expected):
            if dy is None:
                continue
            used, library = True, arrays.library(dy)
            if library is not plan.home:
                rule = f"a {plan.home.name} array, as the inputs are"
                raise RuntimeError(f"{plan.op.name}: dy of {name}: the rule is {rule}; got one of {library.name}")
            if tuple(dy.shape) != out.shape or library.dtype(dy) != out.dtype:
                came = f"{library.dtype(dy)}{list(dy.shape)}"
                raise RuntimeError(f"{plan.op.name}: dy of {name}: the rule is dy.shape, dtype = {out}; got {came}")
        if not used:
            return (None,) * len(plan.inputs)
        return plan.run_backward(dys, self.saved, needs=plan.needs, **self.values)


_Array = np.ndarray
_NO_VALUES: dict[str, Any] = {}
_plans: dict[tuple, Plan] = {}
_MOST_PLANS = 1024
"""About 17 kB each; past that the oldest goes."""


def forward(
    op: Definition, inputs: Sequence[Any], needs: tuple[str, ...], options: dict[str, Any]
) -> tuple[tuple, Call | None]:
    """(outputs, call to run backward with, or None where ``needs`` is empty).

    Raises what the op's rule raises for a wrong call, and Refused where the policy leaves nobody to compute it.
    """
    plan, values = plan_for(op, inputs, needs, options)
    outputs, saved = plan.run_forward(*inputs, **values)
    return outputs, Call(plan, saved, values) if needs else None


def plan_for(
    op: Definition, inputs: Sequence[Any], needs: tuple[str, ...], options: dict[str, Any], like: Any = None
) -> tuple[Plan, dict[str, Any]]:
    """(who computes the call, its dynamic options). Computes nothing; raises as ``forward`` does.

    like: an array that lives where the call's do, when some of ``inputs`` are Specs.
    """
    values = _NO_VALUES
    if op.dynamic:
        values = {k: v for k, v in options.items() if k in op.dynamic}
        if op.guard is not None:
            _guard(op, inputs, options)
        options = {k: v for k, v in options.items() if k not in op.dynamic}
    key: list = [op, _policy.get(), needs]
    try:
        for x in inputs:
            if type(x) is _Array:
                key += x.shape, x.dtype, x.strides
            else:
                key.append(_signature(x))
        if options:
            key += options.items()
        if like is not None:
            key.append(_signature(like))
        plan = _plans.get(found := tuple(key))
    except TypeError:  # an option is a list, or an input no array
        options = {k: _frozen(v) for k, v in options.items()}
        where = () if like is None else (_signature(like),)
        found = (op, _policy.get(), needs, *map(_checked_signature(op), inputs), *options.items(), *where)
        _check_options(op, options)
        plan = _plans.get(found)
    if plan is None:
        plan = _make_plan(op, inputs, needs, options, like)
        if len(_plans) >= _MOST_PLANS:
            _plans.pop(next(iter(_plans)), None)  # another thread may have been faster
        _plans[found] = plan
    return plan, values


def _guard(op: Definition, inputs: Sequence[Any], options: dict[str, Any]) -> None:
    """Raises what the op's guard raises, named."""
    assert op.guard is not None
    try:
        op.guard(*inputs, **options)
    except Exception as error:
        _name(error, op)
        raise


def _check_options(op: Definition, options: dict[str, Any]) -> None:
    for name, value in options.items():
        try:
            hash(value)
        except TypeError:
            rule = "a number, a string, or a list of them"
            raise TypeError(f"{op.name}: {name}: the rule is {rule}; got {type(value).__name__}") from None


def _name(error: Exception, op: Definition) -> None:
    """Say in an error of a rule, or of the data, which op it came from."""
    if getattr(error, "where", None) == "":
        error.where = op.name  # type: ignore[attr-defined]


class Explanation(tuple):
    """(backend that would compute a call, {backend: reason} for those passed over)."""

    taped: dict[str, str]
    """{"forward" or "backward": "taped", or why such calls are not (yet)}; empty where nothing is launched on a GPU."""


def explain(op: Definition, *inputs: Any, needs: Sequence[str] = (), **options: Any) -> Explanation:
    """(backend that would compute the call, {backend: reason} for those passed over). Launches nothing.

    Its attribute ``taped`` says whether launches are replayed. ``inputs`` may be arrays or Specs (taken as arrays on the
    CPU).
    """
    fixed = {k: _frozen(v) for k, v in options.items() if k not in op.dynamic}
    plan = _make_plan(op, inputs, tuple(needs), fixed, quiet=True)
    if op.guard is not None:
        _guard(op, inputs, options)
    found = Explanation((plan.backend, plan.reasons))
    found.taped = launch.explained(plan, [*_plans.values()])
    return found


def _signature(x: Any) -> Any:
    if type(x) is _Array:
        return x.shape, x.dtype, x.strides
    if x is None or type(x) is Spec:
        return x
    if type(x) is list or type(x) is tuple:
        return tuple(map(_signature, x))
    return arrays.library(x).signature(x)


def _checked_signature(op: Definition) -> Callable:
    def signature(x: Any) -> Any:
        try:
            return _signature(x)
        except TypeError as error:
            raise TypeError(f"{op.name}: {error}") from None

    return signature


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


# --- planning --------------------------------------------------------------------------------------------------------


def _make_plan(
    op: Definition, inputs: Sequence[Any], needs: tuple, options: dict[str, Any], like: Any = None, quiet: bool = False
) -> Plan:
    _check_call(op, inputs, needs, options)
    home, device = _home(op, inputs if like is None else [like])
    specs = tuple(arrays.spec(x) for x in inputs) + (None,) * (len(op.inputs) - len(inputs))
    fixed = {k: v for k, v in (op.options | options).items() if k not in op.dynamic}
    try:
        rule = op.rule(*specs, needs=needs, **fixed)
    except Exception as error:
        _name(error, op)
        raise
    full = fixed if rule.options is None else rule.options
    chosen, reasons = _choose(op, specs, needs, full, home, device)
    if not quiet:
        _report(op, chosen, reasons, device)
    forward, backward = _functions(op, chosen)
    if chosen in ("triton", "cuda") and (free := _policy.get().reserve):
        leaving: Callable = functools.partial(_multiprocessors.Leaving, free)
        forward, backward = leaving(forward), backward and leaving(backward)
    if _policy.get().batch_invariant and op.name in _invariance.OPS:
        forward, backward = _invariant(op, chosen, forward), backward and _invariant(op, chosen, backward)
    if op.check is not None and device == "cpu" and chosen in ("numpy", "definition"):  # torch's own look themselves
        forward = _checked(op, op.check, forward)
    bridge = None if home is NUMPY and chosen in ("numpy", "definition") else Bridge(home, chosen, device)
    none = _no_backward
    plan = Plan(op, chosen, forward, backward, full, specs, rule, needs, bridge, home, device, reasons, none, none)
    return plan.bound()


def _invariant(op: Definition, backend: str, function: Callable) -> Any:
    if backend in ("numpy", "definition"):
        module = importlib.import_module("gpulayers.kernels.numpy._invariant")
        function = module.Invariant(function, as_given=op.family == "attention")
    return _invariance.Invariant(function)


def _check_call(op: Definition, inputs: Sequence[Any], needs: Sequence[str], options: dict[str, Any]) -> None:
    if not op.required <= len(inputs) <= len(op.inputs):
        raise TypeError(f"{op.name}: it takes {', '.join(op.inputs)}; got {len(inputs)} inputs")
    for name, x in zip(op.inputs[: op.required], inputs):
        if x is None:
            raise TypeError(f"{op.name}: {name} is required; got None")
    for name in options:
        if name not in op.options:
            raise TypeError(f"{op.name}: unknown option {name!r}; it has {', '.join(op.options) or 'none'}")
    for name in op.needed:
        if name not in options:
            raise TypeError(f"{op.name}: option {name} is required")
    for name in needs:
        if name not in op.differentiable:
            raise ValueError(f"{op.name}: no gradient for {name!r}; it has them for {', '.join(op.differentiable)}")


def _home(op: Definition, inputs: Sequence[Any]) -> tuple[Library, str]:
    """(library, device) that all arrays of a call share; Specs count as NumPy arrays."""
    homes = {(NUMPY, "cpu") if isinstance(x, Spec) else _place(x) for x in arrays.lists(inputs)}
    if len(homes) > 1:
        came = ", ".join(sorted(f"{lib.name} on {device}" for lib, device in homes))
        raise RuntimeError(f"{op.name}: all arrays must be of one library and on one device; got {came}")
    return homes.pop() if homes else (NUMPY, "cpu")


def _place(x: Any) -> tuple[Library, str]:
    lib = arrays.library(x)
    device = lib.device(x)
    if device != "cpu" and not device.startswith("cuda"):
        raise TypeError(f"expected an array on the CPU or on a CUDA device, got one on {device}")
    return lib, device


def _choose(
    op: Definition, specs: tuple, needs: tuple, options: dict, home: Library, device: str
) -> tuple[str, dict[str, str]]:
    policy = _policy.get()
    reasons: dict[str, str] = {}
    for backend in permitted(op.first):
        reason = _reason_against(op, backend, specs, needs, options, home, device, policy)
        if reason is None:
            if backend == "definition" and device != "cpu" and policy.strict:
                break
            return backend, reasons
        reasons[backend] = reason
    why = "; ".join(f"{b}: {r}" for b, r in reasons.items())
    rule = "strict mode forbids the definition" if policy.strict else "no permitted backend serves this call"
    raise Refused(f"{op.name} on {home.name} arrays ({device}): {rule} ({why})")


def _reason_against(
    op: Definition, backend: str, specs: tuple, needs: tuple, options: dict, home: Library, device: str, policy: Policy
) -> str | None:
    against = _invariance.reason_against(op.name, backend, device, specs) if policy.batch_invariant else None
    if against is not None or backend == "definition":
        return against or (_missing("cupy") if device != "cpu" else None)
    on_cpu = backend in ON_CPU
    if on_cpu != (device == "cpu") and backend not in policy.simulate:
        return f"its kernels take {'CPU' if on_cpu else 'CUDA'} arrays"
    if backend == "aten" and home is not TORCH:
        return "its kernels take torch's tensors"
    for package in KERNELS[backend]:
        if (missing := _missing(package)) is not None:
            return missing
    module = kernels(backend, op)
    if not hasattr(module, f"{op.name}_forward"):
        return "no kernel"
    if not on_cpu:
        if device != "cpu" and (old := _too_old(home, device)) is not None:
            return old
        if any(s.dtype == arrays.float64 for s in arrays.lists(specs)):
            return "float64 is left to the definition"
    refuses = getattr(module, f"{op.name}_refuses", None)
    if refuses and policy.reserve:
        refuses = _multiprocessors.Leaving(policy.reserve, refuses)
    return refuses(*specs, needs=needs, **options) if refuses else None


@functools.cache
def _missing(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def installed(backend: str) -> bool:
    """Whether every package that the backend needs is here."""
    return all(_missing(package) is None for package in KERNELS.get(backend, ()))


@functools.cache
def _too_old(home: Library, device: str) -> str | None:
    major, minor = home.capability(device)
    return None if major >= 8 else f"the GPU is sm_{major}{minor}; the kernels need sm_80 or newer"


def kernels(backend: str, op: Definition) -> Any:
    """The module with an op's kernels: its own, else ``kernels.<backend>.<family>``; None without one.

    A broken module raises.
    """
    named = op.kernels.get(backend)
    if named is None:
        return _family(backend, op.family)
    return importlib.import_module(named) if isinstance(named, str) else named


@functools.cache
def _family(backend: str, family: str) -> Any:
    name = f"gpulayers.kernels.{backend}.{family}"
    if importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(name)


def _functions(op: Definition, backend: str) -> tuple[Callable, Callable | None]:
    if backend == "definition":
        return own(op) if (own := _policy.get().definitions) else (op.forward, op.backward)
    module = kernels(backend, op)
    return getattr(module, f"{op.name}_forward"), getattr(module, f"{op.name}_backward", None)


def _checked(op: Definition, check: Callable, forward: Callable) -> Callable:
    """``forward``, after a look at the data."""

    def checked(*inputs: Any, needs: tuple, **options: Any) -> tuple[tuple, dict]:
        try:
            check(*inputs, **options)
        except Exception as error:
            _name(error, op)
            raise
        return forward(*inputs, needs=needs, **options)

    return checked


_reported: set[tuple[str, str]] = set()


def _report(op: Definition, chosen: str, reasons: dict[str, str], device: str) -> None:
    """One log line for each fallback: on a GPU a warning, on the CPU only where a NumPy kernel refused."""
    for backend, reason in reasons.items():
        passed_over = reason if device != "cpu" else reason if backend == "numpy" and reason != "no kernel" else None
        if (
            passed_over is None
            or (op.name, text := f"{backend}: {reason}") in _reported
            or chosen in ("triton", "cuda")
        ):
            continue
        _reported.add((op.name, text))
        log.log(logging.INFO if device == "cpu" else logging.WARNING, "%s runs on %s (%s)", op.name, chosen, text)
