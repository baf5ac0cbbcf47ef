"""What all drop-ins of torch.optim share: which tensors one launch updates, and what is left to torch's own step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpulayers import dispatch
from gpulayers.definition import RuleError
from gpulayers.ops._op import Op
from gpulayers.torch._op import _FLOATS, _PLAIN, fallbacks, is_plain


class _Left(Exception):
    """Torch's own step must update this group; says why."""


class _Launch:
    """One update of some of a group's tensors, planned; call it to run it. Raises what its op's rule raises."""

    def __init__(self, op: Op, lists: Sequence[Any], options: dict[str, Any]):
        self.op, self.lists = op, lists
        self.local = [
            [_local(t, p) for t, p in zip(tensors, lists[0])] if isinstance(tensors, list) else tensors
            for tensors in lists
        ]
        self.plan, self.values = dispatch.plan_for(op, self.local, (), options)

    def __call__(self) -> None:
        self.plan.run_forward(*self.local, **self.values)
        for name, tensors in zip(self.op.inputs, self.lists):
            if name in self.op.updates and tensors is not None:
                torch.autograd.graph.increment_version(tensors)


def _check_capture(optimizer: torch.optim.Optimizer) -> None:
    """torch's error for a CUDA graph that captures a step without ``capturable``."""
    name = "_accelerator_graph_capture_health_check"
    old = "_cuda_graph_capture_health_check"  # before torch 2.10
    getattr(optimizer, name if hasattr(optimizer, name) else old)()


def _loss(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _scaling(optimizer: Any) -> dict[str, Any]:
    """What GradScaler leaves on a ``fused`` optimizer."""
    return {name: getattr(optimizer, name, None) for name in ("grad_scale", "found_inf")}


def _updated(optimizer: Any, launches: Callable[[], list], must: str = "") -> bool:
    """Run the launches of a group; False where it is torch's to update. must: the argument with which torch cannot."""
    if torch.compiler.is_compiling():
        return False
    name = type(optimizer).__name__
    try:
        scale, found_inf = _scaling(optimizer).values()
        if any(t is not None and not t.is_cpu for t in (scale, found_inf)):
            raise _Left("GradScaler's numbers are on a GPU, and reading them would wait")
        planned = launches()
    except (_Left, RuleError, dispatch.Refused) as why:
        if must:
            raise RuntimeError(
                f"{name}: {must}: the rule is what torch's own step need not update; got {why}"
            ) from None
        policy = dispatch._policy.get()
        if isinstance(why, dispatch.Refused) and (policy.strict or "definition" not in policy.backends):
            raise
        if policy.strict:
            raise dispatch.Refused(f"{name}: strict mode forbids torch's own step ({why})") from None
        if (name, str(why)) not in fallbacks:
            fallbacks.add((name, str(why)))
            dispatch.log.log(logging.INFO, "%s runs on torch's own step (%s)", name, why)
        return False
    if found_inf is not None and found_inf.item():
        return True  # nothing moves, the step count neither
    if scale is not None:  # as torch's fused step, it leaves the gradients unscaled
        grads = [g for each in planned if isinstance(each, _Launch) for g in each.local[1]]
        torch._foreach_div_(grads, scale)
    for each in planned:
        each()
    return True


def _step_groups(optimizer: Any, own: Any, closure: Callable[[], Any] | None, must: str = "") -> Any:
    """The closure's loss, once each group is updated: by its launches, or by ``own``, torch's step, which sees it alone."""
    loss, groups = _loss(closure), optimizer.param_groups
    for group in groups:
        if not _updated(optimizer, lambda: optimizer._launches(group), must):  # noqa: B023
            optimizer.param_groups = [group]
            try:
                own(optimizer)
            finally:
                optimizer.param_groups = groups
    return loss


def _numbers(group: dict, *names: Any) -> dict[Any, float]:
    """These hyperparameters as numbers; a tensor of one element is one too."""
    for name in names:
        value = group[name]
        if isinstance(value, Tensor) and (not value.is_cpu or value.requires_grad):
            raise _Left(f"{name} is a tensor that has a gradient or is on a GPU")
    return {name: float(group[name]) for name in names}


def _alike(params: Sequence[Tensor], marks: Sequence[Any]) -> list[list[int]]:
    """Indices of the parameters that one launch updates: one device, dtype and mark (the step)."""
    groups: dict[tuple, list[int]] = {}
    for i, (p, mark) in enumerate(zip(params, marks)):
        groups.setdefault((p.device, p.dtype, mark), []).append(i)
    return list(groups.values())


def _local(t: Tensor, p: Tensor) -> Tensor:
    """The plain tensor that ``t``, which belongs to parameter ``p``, is on this process."""
    if type(t) not in _PLAIN and hasattr(t, "to_local"):
        if (t.placements, t.device_mesh) != (getattr(p, "placements", None), getattr(p, "device_mesh", None)):  # type: ignore[attr-defined]
            raise _Left("a gradient or state is spread over the processes in another way than its parameter")
        t = t.to_local()
    plain = is_plain(t) and t.dtype in _FLOATS and (t.is_cpu or t.is_cuda)
    if not plain or torch._C._len_torch_dispatch_stack():
        raise _Left(f"a {t.dtype} {type(t).__name__} ({t.layout}, {t.device.type}) is no plain dense tensor of floats")
    return t
