"""A gpulayers ``Layer`` as an ``nn.Module``.

Its array code runs on NumPy views of CPU tensors, and on CuPy views of CUDA tensors. For the time of a call the layer's
weights are views of the module's tensors and its frames are that call's own; autograd's context keeps them, every saved
array as a saved tensor, so that activation checkpointing and saved-tensor hooks see them.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from gpulayers import arrays, fusing, random, transfer
from gpulayers.arrays import TORCH
from gpulayers.dispatch import Call
from gpulayers.layers._frames import Frame, by_itself, recording
from gpulayers.layers._layer import Layer
from gpulayers.layers._weight import Weight
from gpulayers.torch import _exported
from gpulayers.torch._op import in_memory, is_transformed
from gpulayers.transfer import Bridge

_lock = threading.RLock()
"""A layer serves one call at a time: its weights and frames are lent to it."""


def wrap(layer: Layer, *input_shapes: tuple, fuse: bool = False) -> Wrapped:
    """``layer`` as an ``nn.Module``: weights are its parameters, those that are never trained its buffers.

    input_shapes: batch first; needed where the layer adds weights when it sees them. fuse: on a GPU it is one Triton kernel
    each way (``gl.fuse``, whose FusionError this raises). Weights keep their names
    ("0.weight"; a shared one has several, as in torch) and, where they are, their memory. From then on the module's
    tensors are the weights: train, move and load the module; ``module.layer`` is the layer that sees them, to save or to
    read.

    Autograd, ``train``/``eval``, hooks, state dicts, copies, pickles, checkpointing, DDP and FSDP2 work; random numbers
    are drawn from torch's generator. A gradient of a gradient raises NotImplementedError. ``torch.compile`` leaves the
    layer out of its graphs (it breaks them there, so ``fullgraph=True`` refuses it). ``torch.export`` and
    ``torch.onnx.export(…, dynamo=True)`` record the layer's array code and write it as torch's operations, or say which
    line cannot be read; its gradients there are torch's. Regularizers and constraints act in ``fit`` alone; a weight that
    has one is warned of.

    Raises TypeError for what is no Layer, RuntimeError for a layer that is not built.
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"wrap: layer: the rule is a gpulayers Layer; got {type(layer).__name__}")
    if input_shapes:
        layer.ensure_built(*input_shapes)
    layer.build_status()
    return Wrapped(fusing.fuse(layer) if fuse else layer)


class Wrapped(nn.Module):
    """A gpulayers layer in torch; ``wrap`` makes it."""

    def __init__(self, layer: Layer):
        super().__init__()
        self._layer: Layer
        self._layer, self._names = layer, list(layer.named_weights())
        for w in layer.weights:
            if w.regularizer is not None or w.constraint is not None:
                warnings.warn(f"{w.name}: its regularizer and constraint act in fit alone", UserWarning, stacklevel=3)
        self._ties = _register(self, layer)
        super().train(layer.training)  # parts of the layer that are in evaluation mode stay so

    def forward(self, *xs: Any) -> Any:
        if torch.compiler.is_exporting():
            if torch.compiler.is_dynamo_compiling():
                raise NotImplementedError("a wrapped layer records its array code: export it with strict=False")
            weights = {name: t for name, (t, _) in zip(self._names, _tensors(self))}
            return _exported.run(self._layer, self.training, xs, weights)
        if torch.compiler.is_compiling():
            return _outside_the_graph(self, xs)
        return _call(self, xs)

    def train(self, mode: bool = True) -> Wrapped:
        super().train(mode)
        self._layer.train(mode)
        return self

    def extra_repr(self) -> str:
        return repr(self._layer)

    @property
    def layer(self) -> Layer:
        """The layer, its weights views of the module's tensors (copies on the CPU where these are DTensors)."""
        for w, (t, _) in zip(self._layer.weights, _tensors(self)):
            whole: Any = t.detach()
            whole = whole.full_tensor().cpu() if hasattr(whole, "full_tensor") else whole
            w.data = _bridge(TORCH.device(whole)).inward(whole, writeable=True)
        return self._layer


def _register(module: nn.Module, layer: Layer) -> dict[str, str]:
    """Put each weight where its names say, in modules within modules: a layer that is used twice is one module under both
    names, a weight that two layers share one tensor in both. Returns {name of such a tensor: the first one's}."""
    homes: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}
    names: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, owner, w in layer._places():
        path, _, leaf = name.rpartition(".")
        home = homes.setdefault(id(owner), _submodule(module, path, homes.get(id(owner))))
        if leaf in home._parameters or leaf in home._buffers:
            continue
        if id(w) in names:
            ties[name] = names[id(w)]
        else:
            tensor = transfer.view(w.data, arrays.library(w.data).name, "torch")
            learned = w.learned and tensor.is_floating_point()
            tensors[id(w)] = nn.Parameter(tensor, requires_grad=w.trainable) if learned else tensor
            names[id(w)] = name
        t = tensors[id(w)]
        if isinstance(t, nn.Parameter):
            home.register_parameter(leaf, t)
        else:
            home.register_buffer(leaf, t)
    return ties


def _submodule(module: nn.Module, path: str, known: nn.Module | None) -> nn.Module:
    """The module at a path, made where there is none: ``known``, or a new one."""
    *before, last = path.split(".")
    for part in before:
        module = module._modules.get(part) or _added(module, part, nn.Module())
    return module._modules.get(last) or _added(module, last, known or nn.Module()) if last else module


def _added(module: nn.Module, name: str, child: nn.Module) -> nn.Module:
    module.add_module(name, child)
    return child


def _tensors(module: Wrapped) -> list[tuple[Tensor, bool]]:
    """For each of the layer's weights the tensor as it is now (parametrized, gathered, …), and whether it is a buffer."""
    for name, first in module._ties.items():
        if _tensor(module, name)[0] is not (shared := _tensor(module, first)[0]) and isinstance(shared, nn.Parameter):
            rule = f"the tensor that {first} is, as the layers share one weight"
            raise RuntimeError(f"{module._layer.name}: {name}: the rule is {rule}; got another one")
    return [_tensor(module, name) for name in module._names]


def _tensor(module: Wrapped, name: str) -> tuple[Tensor, bool]:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    return getattr(owner, leaf), leaf in owner._buffers


@dataclass(slots=True)
class _Invocation:
    """What a call needs besides the tensors that autograd sees."""

    layer: Layer
    inputs: int
    buffers: list[Tensor | None]
    """For each weight its buffer, or None for a parameter."""
    record: bool
    several: bool = False
    """Whether forward returned a tuple."""


def _call(module: Wrapped, xs: Sequence[Any]) -> Any:
    found = _tensors(module)
    everything = [*xs, *(t for t, _ in found)]
    for x in everything:
        if not isinstance(x, Tensor) or not (x.is_cpu or x.is_cuda) or x.layout is not torch.strided or x.is_nested:
            came = f"a {_layout(x)} tensor on {x.device.type}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{module._layer.name}: the rule is dense tensors on the CPU or a CUDA device; got {came}")
    xs = [*map(in_memory, xs)]
    if len(devices := {str(x.device) for x in everything}) > 1:
        raise RuntimeError(f"{module._layer.name}: all tensors must be on one device; got {', '.join(sorted(devices))}")
    record = torch.is_grad_enabled() and any([t.requires_grad for t in everything])
    what = _Invocation(module._layer, len(xs), [t if fixed else None for t, fixed in found], record)
    outputs = _Function.apply(what, *xs, *[None if fixed else t for t, fixed in found])
    return outputs if what.several else outputs[0]


def _layout(x: Tensor) -> str:
    return "nested" if x.is_nested else str(x.layout).removeprefix("torch.")


_outside_the_graph: Any = torch._disable_dynamo(_call)  # torch.compiler.disable imports the compiler
_outside_the_graph._torchdynamo_disable = True
_outside_the_graph._torchdynamo_disable_msg = (
    "gpulayers.torch.wrap: a wrapped layer runs outside of the graph: compile without fullgraph=True"
)


class _Function(torch.autograd.Function):
    """(what, *inputs, *weights) → the layer's outputs."""

    @staticmethod
    def forward(ctx: Any, what: _Invocation, *tensors: Any) -> Any:
        xs, weights = tensors[: what.inputs], _filled(tensors[what.inputs :], what.buffers)
        bridge = _bridge(TORCH.device((*xs, *weights)[0]))
        with bridge.entered(), _lent(what, weights, bridge) as views:
            y = what.layer.forward(*map(bridge.inward, xs))
            what.several = isinstance(y, tuple)
            frames = what.layer._waiting.frames
            _take_updates(what, weights, views, bridge)
        ys = _apart([bridge.outward(a) for a in (y if what.several else (y,))], [*xs, *weights])
        ctx.mark_non_differentiable(*[t for t in ys if not t.is_floating_point()])
        if what.record:
            keeper = _Keeper([*xs, *weights, *ys])
            ctx.what, ctx.frames = what, keeper.packed(frames)
            ctx.parameters = len(tensors) - what.inputs
            ctx.save_for_backward(*tensors[what.inputs :], *keeper.tensors)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> Any:
        what, name = ctx.what, ctx.what.layer.name
        if torch.is_grad_enabled():
            raise NotImplementedError(f"{name}: a wrapped layer has no gradient of its gradient (create_graph=True)")
        if is_transformed(dys):
            raise NotImplementedError(f"{name}: a wrapped layer's backward takes no batched and no dual gradients")
        dys = tuple(map(in_memory, dys))
        saved = ctx.saved_tensors
        weights, kept = _filled(saved[: ctx.parameters], what.buffers), saved[ctx.parameters :]
        bridge = _bridge(TORCH.device(dys[0]))
        with bridge.entered(), _lent(what, weights, bridge):
            what.layer._waiting.frames = _unpacked(ctx.frames, [bridge.inward(t) for t in kept])
            dxs = what.layer.backward(*[bridge.inward(dy) if dy.is_floating_point() else None for dy in dys])
            dws = [_gradient(w) for w in what.layer.weights]
        dxs = dxs if isinstance(dxs, tuple) else (dxs,)
        dxs += (None,) * (what.inputs - len(dxs))
        wanted = [g if need else None for g, need in zip((*dxs, *dws), ctx.needs_input_grad[1:])]
        given = iter(_apart([bridge.outward(g) for g in wanted if g is not None], [*dys, *weights, *kept]))
        return (None, *[None if g is None else next(given) for g in wanted])


@functools.cache
def _bridge(device: str) -> Bridge:
    return Bridge(TORCH, "definition", device)


def _filled(tensors: Sequence[Tensor | None], buffers: Sequence[Tensor | None]) -> list[Any]:
    return [b if t is None else t for t, b in zip(tensors, buffers)]


@contextlib.contextmanager
def _lent(what: _Invocation, tensors: Sequence[Tensor], bridge: Bridge) -> Iterator[list]:
    """The layer's weights are views of these inside, without gradients, and its frames are empty."""
    weights, waiting = what.layer.weights, what.layer._waiting
    with _lock, random.drawn_from(_seed), by_itself():
        before = [(w._data, w._grad, w.trainable) for w in weights]
        frames, waiting.frames = waiting.frames, []
        token = recording.set(what.record)
        try:
            views = [bridge.inward(t.detach(), b is not None) for t, b in zip(tensors, what.buffers)]
            for w, t, view in zip(weights, tensors, views):
                w.data, w._grad, w.trainable = view, None, t.requires_grad
            yield views
        finally:
            recording.reset(token)
            for w, (data, grad, trainable) in zip(weights, before):
                w._data, w._grad, w.trainable = data, grad, trainable
            waiting.frames = frames


def _seed() -> int:
    """From torch's generator on the CPU: nothing waits for a GPU, and checkpointing draws the same again."""
    return int(torch.randint(0, 2**63 - 1, (), device="cpu"))


def _take_updates(what: _Invocation, tensors: Sequence[Tensor], views: list, bridge: Bridge) -> None:
    """What forward did to the weights that are buffers (running statistics) happens to these."""
    for w, t, view, buffer in zip(what.layer.weights, tensors, views, what.buffers):
        if w._data is view:
            if buffer is not None and what.layer.training and not t.is_inference():
                torch.autograd.graph.increment_version(t)
        elif buffer is None:
            raise RuntimeError(f"{w.name}: forward replaces the data of a trainable weight")
        else:
            t.copy_(bridge.outward(w._data))


def _gradient(w: Weight) -> Any:
    if not w.has_grad:
        return None
    g = np.asarray(w.grad) if isinstance(w.grad, np.generic | float) else w.grad
    if tuple(g.shape) != w.shape:
        raise RuntimeError(f"{w.name}: grad: the rule is grad.shape = {list(w.shape)}; got {list(g.shape)}")
    return arrays.cast(g, w.dtype)


# --- memory that may be shared, and what autograd keeps --------------------------------------------------------------


def _span(t: Tensor) -> tuple[Any, int, int]:
    """(device, first byte, first byte after it)."""
    if not t.numel():
        return t.device, 0, 0
    last = sum((n - 1) * step for n, step in zip(t.shape, t.stride()))
    return t.device, t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _overlap(a: Tensor, b: Tensor) -> bool:
    (where, start, end), (there, first, last) = _span(a), _span(b)
    return where == there and start < last and first < end


def _apart(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, copied where they share memory with others or with each other: autograd may write to them."""
    found: list[Tensor] = []
    for t in tensors:
        found.append(t.clone() if any(_overlap(t, other) for other in (*others, *found)) else t)
    return found


class _Kept(NamedTuple):
    """Stands for a saved array."""

    place: int


class _Keeper:
    """Takes the arrays out of a call's frames, as tensors for ``save_for_backward``.

    An array that is one of ``known`` (inputs, weights, outputs) is kept as that tensor, and of one that shares memory
    with some of them those are kept too: torch then notices if they are written to before the backward.
    """

    def __init__(self, known: Sequence[Tensor]):
        self.known = known
        self.tensors: list[Tensor] = []
        self._index: dict[tuple, int] = {}

    def packed(self, value: Any) -> Any:
        if isinstance(value, Frame):
            frame = Frame()
            frame.saved, frame.inputs, frame.outputs = self.packed(value.saved), value.inputs, value.outputs
            frame.calls = {
                cls: [(self.packed(c), _hollow(xs)) for c, xs in calls] for cls, calls in value.calls.items()
            }
            frame.children = self.packed(value.children)
            return frame
        if isinstance(value, Call):
            return Call(value.plan, self.packed(value.saved), value.values)
        if type(value) is dict:
            return {k: self.packed(v) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self.packed, value))
        return self._keep(value) if _is_array(value) else value

    def _keep(self, array: Any) -> _Kept:
        tensor = transfer.lend_to_torch(array) if isinstance(array, np.ndarray) else transfer.cupy_to_torch(array)
        tensor = next((t for t in self.known if _alias(t) == _alias(tensor)), tensor)
        if _alias(tensor) not in self._index:
            self._add(tensor)
            for t in self.known:
                if _overlap(t, tensor) and _alias(t) not in self._index:
                    self._add(t)
        return _Kept(self._index[_alias(tensor)])

    def _add(self, tensor: Tensor) -> None:
        self._index[_alias(tensor)] = len(self.tensors)
        self.tensors.append(tensor)


def _unpacked(value: Any, kept: list) -> Any:
    """``value`` with its arrays again, its lists and frames fresh: backward empties them, and may come twice."""
    if isinstance(value, Frame):
        frame = Frame()
        frame.saved, frame.inputs, frame.outputs = _unpacked(value.saved, kept), value.inputs, value.outputs
        frame.calls = {cls: [(_unpacked(c, kept), xs) for c, xs in calls] for cls, calls in value.calls.items()}
        frame.children = _unpacked(value.children, kept)
        return frame
    if isinstance(value, Call):
        return Call(value.plan, _unpacked(value.saved, kept), value.values)
    if isinstance(value, _Kept):
        return kept[value.place]
    if type(value) is dict:
        return {k: _unpacked(v, kept) for k, v in value.items()}
    return type(value)(_unpacked(v, kept) for v in value) if type(value) in (list, tuple) else value


def _alias(t: Tensor) -> tuple:
    return t.device, t.data_ptr(), t.dtype, t.shape, t.stride()


def _is_array(value: Any) -> bool:
    cupys = type(value).__module__.partition(".")[0] == "cupy" and hasattr(value, "__dlpack__")
    return (isinstance(value, np.ndarray) or cupys) and value.dtype in arrays._torch_dtypes()[0]


def _hollow(xs: Sequence[Any]) -> tuple:
    """An op's inputs for its backward, which asks for their dtypes alone."""
    return tuple(np.empty(0, x.dtype) if _is_array(x) else x for x in xs)
