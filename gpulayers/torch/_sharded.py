"""DTensors: an op runs on the local parts, as plain tensors, where the placements of its inputs say how.

A rule sees one dimension of the mesh: where the inputs are, to where each must go, and where the outputs then are. The
gradient of what every process had whole is a sum over the processes (Partial) where the outputs were parts; DTensor's own
``to_local`` and ``from_local`` carry that through autograd, and nothing is communicated but what ``redistribute`` moves.
All that has no rule is torch's own function's, with the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

_MODULE = "torch.distributed.tensor"


class _Here(NamedTuple):
    """What a rule sees."""

    ins: Sequence[Any]
    """The inputs, DTensors or None."""
    places: list[Any]
    """Of each, in one dimension of the mesh: "whole", the dimension that is cut, or None where there is no input."""
    options: Sequence[Any]


_Found = tuple[list[Any], list[Any]]
"""To where the inputs go, and where the outputs are: as ``_Here.places``, outputs "partial" too."""


def is_sharded(ins: Sequence[Any]) -> bool:
    """Whether a DTensor is among the inputs."""
    module = sys.modules.get(_MODULE)
    if module is not None:
        for t in ins:  # compilers look into loops faster than into comprehensions
            if isinstance(t, module.DTensor):
                return True
    return False


def call(of: Any, args: Sequence[Any]) -> Any:
    """The outputs of the TorchOp ``of`` as DTensors. Raises NotImplementedError, with the reason, where there is no rule for the placements."""
    from torch.distributed.tensor import DTensor

    ins, options = args[: of.n], args[of.n :]
    given = [t for t in ins if t is not None]
    if not all([isinstance(t, DTensor) for t in given]):
        raise NotImplementedError("DTensors and plain tensors are mixed")
    mesh, rule = given[0].device_mesh, _rule_of(of, ins)
    if any([t.device_mesh != mesh for t in given]):
        raise NotImplementedError("its DTensors are on several meshes")
    found = [
        rule(_Here(ins, [None if t is None else _place(t.placements[d]) for t in ins], options))
        for d in range(mesh.ndim)
    ]
    wanted = [[to[i] for to, _ in found] for i in range(of.n)]
    outs = [[out[i] for _, out in found] for i in range(len(found[0][1]))]
    parted = ["whole" not in out for _, out in found]  # so a whole input's gradient is a sum over the processes
    apart = ["partial" in out for _, out in found]
    locals_: list[Any] = [t if t is None else _local(t, to, parted, apart) for t, to in zip(ins, wanted)]
    if any(apart) and ins[2] is not None and any([a and mesh.get_local_rank(d) for d, a in enumerate(apart)]):
        locals_[2] = locals_[2] - locals_[2].detach()  # added once; each process has its whole gradient
    results = of(*locals_, *options)
    shapes = _shapes(of, ins)
    if isinstance(results, Tensor):
        return _global(results, mesh, outs[0], shapes[0])
    return tuple([_global(y, mesh, out, shape) for y, out, shape in zip(results, outs, shapes)])


def _place(placement: Any) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    if isinstance(placement, Replicate | Partial):  # a sum is made before it is used
        return "whole"
    if type(placement) is Shard:
        return placement.dim
    raise NotImplementedError(f"no rule for what is placed as {placement}")


def _placements(places: Sequence[Any]) -> list[Any]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    named = {"whole": Replicate(), "partial": Partial()}
    return [named[p] if isinstance(p, str) else Shard(p) for p in places]


def _local(t: Any, to: Sequence[Any], parted: Sequence[bool], apart: Sequence[bool]) -> Tensor:
    gradient = ["partial" if p == "whole" and cut and not a else p for p, cut, a in zip(to, parted, apart)]
    wanted = _placements(to)
    if t.placements != tuple(wanted):  # else it would sum the gradient at once, where several may add up first
        t = t.redistribute(placements=wanted)
    return t.to_local(grad_placements=_placements(gradient))


def _global(y: Tensor, mesh: Any, places: Sequence[Any], shape: Any) -> Any:
    from torch.distributed.tensor import DTensor

    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    how = {"run_check": False, "shape": shape, "stride": tuple(reversed(strides))}
    return DTensor.from_local(y.contiguous(), mesh, _placements(places), **how)


# --- rules -------------------------------------------------------------------------------------------------------------


def _refused(here: _Here) -> NotImplementedError:
    return NotImplementedError(f"no rule for DTensors cut so: {here.places}")


def _alike(here: _Here) -> _Found:
    """Element by element: all are where the first is."""
    place = here.places[0]
    return [None if p is None else place for p in here.places], [place]


def _rows(here: _Here, axes: int, arrays: int, outputs: int) -> _Found:
    """Over the last ``axes``, which no process may have a part of; the first ``arrays`` inputs have rows, the others none."""
    place = here.places[0]
    if place != "whole" and place >= here.ins[0].dim() - axes:
        raise _refused(here)
    to = [None if p is None else place if i < arrays else "whole" for i, p in enumerate(here.places)]
    return to, [place] * outputs


def _softmax(here: _Here) -> _Found:
    place, axis, dims = here.places[0], here.options[0], here.ins[0].dim()
    if place == axis % max(dims, 1):
        raise _refused(here)
    return [place], [place]


def _linear(here: _Here) -> _Found:
    x, weight, bias = here.places
    last, activation = here.ins[0].dim() - 1, here.options[0]
    if here.ins[1].dim() != 2:
        raise _refused(here)
    if weight == "whole" and x != last and bias in (None, "whole"):
        return [x, "whole", bias], [x]
    if weight == 0 and x == "whole":  # columns of y
        return ["whole", 0, None if bias is None else 0], [last]
    if weight == 1 and x == last and bias in (None, "whole") and activation is None:  # a sum over parts of a row
        return [last, 1, bias], ["partial"]
    raise _refused(here)


def _linears(here: _Here) -> _Found:
    to, outs = list(here.places), []
    for i in range(1, 4):
        if here.places[i] is not None:
            one = _Here([here.ins[0], here.ins[i]], [here.places[k] for k in (0, i, i + 3)], (None,))
            (to[0], to[i], to[i + 3]), (out,) = _linear(one)
            outs.append(out)
    if "partial" in outs or len(set(outs)) > 1:
        raise _refused(here)
    return to, outs


def _embedding(here: _Here) -> _Found:
    weight, indices = here.places
    if weight == "whole" and not (here.options[1] and indices != "whole"):  # scale_grad_by_freq counts all indices
        return ["whole", indices], [indices]
    if weight == 1 and indices == "whole":
        return [1, "whole"], [here.ins[1].dim()]
    raise _refused(here)  # rows of the table: torch's own masks what lies elsewhere


def _norm(arrays: int, outputs: int) -> Callable[[_Here], _Found]:
    return lambda here: _rows(here, len(here.options[0]), arrays, outputs)


_RULES: dict[str, Callable[[_Here], _Found]] = {
    "linear": _linear,
    "linears": _linears,
    "embedding": _embedding,
    "layer_norm": _norm(1, 1),
    "rms_norm": _norm(1, 1),
    "add_layer_norm": _norm(2, 2),
    "add_rms_norm": _norm(2, 2),
    **dict.fromkeys(("softmax", "softmin", "log_softmax"), _softmax),
}


def _rule_of(of: Any, ins: Sequence[Any]) -> Callable[[_Here], _Found]:
    found = _RULES.get(of.name)
    if found is None and of.pointwise and of.name != "glu" and all([t.shape == ins[0].shape for t in ins]):
        found = _alike
    if found is None:
        raise NotImplementedError("it has no rule for DTensors")
    return found


def _shapes(of: Any, ins: Sequence[Any]) -> list[tuple[int, ...]]:
    """Of the outputs, on all processes together."""
    if of.name in ("linear", "linears"):
        weights = ins[1:2] if of.name == "linear" else ins[1:4]
        return [(*ins[0].shape[:-1], w.shape[0]) for w in weights if w is not None]
    if of.name == "embedding":
        return [(*ins[1].shape, ins[0].shape[1])]
    return [tuple(ins[0].shape)] * 2
