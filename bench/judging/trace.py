"""All that a training step of a patched model runs, gpulayers' ops and torch's own, under autocast in bfloat16 as on a GPU: found
with fake tensors of the model's full size, nothing is computed."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from gpulayers.bench.models.kind import Kind
from gpulayers.kernels.triton import _tile
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import gpulayers.torch as gt
from gpulayers.inventory import ops
from gpulayers.testing import _launches
from gpulayers.testing.audit_op import launchers
from gpulayers.testing.compiling import one
from gpulayers.torch import _autocast, _inductor, _library

_FREE = {"prim", "profiler"}
"""torch's namespaces whose operations move nothing."""


class Ran(NamedTuple):
    name: str
    """gpulayers' op ("linear", "linear_backward"), or torch's operation ("add")."""
    is_ours: bool
    nbytes: int
    """Of the arrays that it takes and gives, once each."""
    launches: int
    inputs: dict[str, tuple[int, ...]]
    """The shapes of our op's own inputs, in backward too; of those that torch's operation takes."""
    options: dict[str, Any]


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Autocast of CPU tensors follows CUDA's rules."""
    rules = dict(_autocast.ON_CUDA), dict(_autocast.ON_CPU), _autocast.WIDENED
    _autocast.ON_CUDA["cpu"] = _autocast.ON_CUDA["cuda"]
    _autocast.ON_CPU.clear()
    _autocast.WIDENED = "cpu"
    _autocast.KINDS.add(FakeTensor)
    try:
        yield
    finally:
        _autocast.ON_CUDA.clear()
        _autocast.ON_CUDA.update(rules[0])
        _autocast.ON_CPU.update(rules[1])
        _autocast.WIDENED = rules[2]
        _autocast.KINDS.discard(FakeTensor)


def traced(kind: Kind, fuse: bool = True, arch: int = 90) -> list[Ran]:
    """Of forward and backward, in their order. fuse: as ``gt.patch`` takes it."""
    model, batch = kind.on_meta()
    gt.patch(model, fuse=fuse)
    made: dict[Tensor, Tensor] = {}

    def faked(x: Tensor) -> Tensor:
        if x not in made:
            made[x] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).requires_grad_(x.requires_grad)
        return made[x]

    with FakeTensorMode(), as_on_a_gpu():
        for held in (store for m in model.modules() for store in (m._parameters, m._buffers)):
            held.update({name: faked(t) for name, t in held.items() if t is not None})
        given = [faked(t) for t in batch]
        with _Noting(arch) as noted:
            for _ in range(2):  # blocks learn which norms follow them
                noted.found.clear()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(*given)
            loss.backward()
    return noted.found


class _Noting(TorchDispatchMode):
    def __init__(self, arch: int) -> None:
        super().__init__()
        self.arch, self.found = arch, []  # type: tuple[int, list[Ran]]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        space, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        given, made = _tensors(args), _tensors([y])
        stores = {t.untyped_storage()._cdata for t in given}
        is_view = made and all(t.untyped_storage()._cdata in stores for t in made) and not func._schema.is_mutable
        if space in _FREE or is_view or not made or name.startswith(("empty", "new_empty")):
            return y
        nbytes = sum({id(t): t.numel() * t.element_size() for t in (*given, *made)}.values())
        if space == _library.NAMESPACE:
            self.found.append(self._ours(name, args, nbytes))
        else:
            shapes = {str(i): tuple(t.shape) for i, t in enumerate(given)}
            self.found.append(Ran(name, False, nbytes, 1, shapes, {}))
        return y

    def _ours(self, name: str, args: Any, nbytes: int) -> Ran:
        forward = name.removesuffix("_backward")
        op = _library_of(forward)
        if name == forward:
            specs = [None if x is None else _inductor.spec_of(x) for x in args[: op.n]]
            needs = op._present(specs) if args[-1] else ()
            options = op._values(args[op.n : -1])
        else:
            needs, specs, _ = op.gradients_of(args)
            options = op._values(args[-1 - len(op.options) : -1])
        with _disable_current_modes():  # launchers want torch's meta tensors
            both = _counted(op.op, tuple(specs), tuple(needs), tuple(options.items()), self.arch)
        shapes = {k: tuple(s.shape) for k, s in zip(op.inputs, specs) if s is not None}
        return Ran(name, True, nbytes, both[name != forward], shapes, options)


def _tensors(args: Any) -> list[Tensor]:
    found = []
    for a in args:
        if isinstance(a, list | tuple):
            found += _tensors(a)
        elif isinstance(a, Tensor):
            found.append(a)
    return found


def _library_of(name: str) -> Any:
    op = next(op for op in ops() if op.name == name)
    return getattr(importlib.import_module(f"gpulayers.torch.{op.family}"), f"_{name}").library


@functools.cache
def _counted(op: Any, specs: tuple, needs: tuple, options: tuple, arch: int) -> tuple[int, int]:
    """How many kernels forward and backward launch."""
    seen: list[Any] = []
    before, _tile.pretend = _tile.pretend, one(arch)
    try:
        with _launches.catching("meta", lambda launch, kernel, *how: seen.append(kernel)):
            forward, backward = launchers(op, specs, needs, dict(options))
            _, saved = forward()
            count = len(seen)
            if needs:
                backward(saved)
    finally:
        _tile.pretend = before
    return count, len(seen) - count
