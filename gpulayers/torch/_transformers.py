"""What ``patch`` does to models of Hugging Face's transformers beyond their layers: attention by transformers' interface, rotary
positions, functions of torch.nn.functional and losses that their forwards call, experts' gates.

A class or function is served for what it computes on a random input, and not for its name; else it is left alone.
transformers is never imported by ``import gpulayers.torch``; where a model of it is there, it is imported already.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from gpulayers.torch import _transformers_attention as attention
from gpulayers.torch._activation_like import ActivationLike, activation_class_for
from gpulayers.torch._logits import Logits
from gpulayers.torch._rebuilt import rebuilt, rebuilt_class
from gpulayers.torch._standing import Standing, standing
from gpulayers.torch.activation import gated
from gpulayers.torch.loss import cross_entropy
from gpulayers.torch.rotary import apply_rotary_pos_emb

_BEFORE = "_gpulayers_before"
"""Where a model of transformers keeps what ``unpatch`` gives back: {"attention": {id: (config, name)}, "loss": function}."""


def is_of_transformers(own: type) -> bool:
    return "transformers" in sys.modules and own.__module__.startswith("transformers.models.")


def forward_class(own: Any) -> Any:
    """The class before a model's or a block's, whose forward calls our functions; None where it calls none that we have."""
    return rebuilt_class(own, _served) if is_of_transformers(own) else None


def why_left(module: nn.Module) -> str:
    """Why a module of transformers that has no others is left."""
    if any(name.endswith("inv_freq") for name in module._buffers):
        return "it makes the tables of cosines and sines, once for all layers"
    if isinstance(module, nn.Identity):
        return "it computes nothing"
    return ""


class Experts(Standing):
    """Stands before a class of experts, whose products stay those of its ``experts_implementation``."""

    def _apply_gate(self, joint: Tensor) -> Tensor:
        act: Any = self.act_fn  # type: ignore[attr-defined]
        if isinstance(act, ActivationLike):
            return gated(joint, activation=act._activation)
        return super()._apply_gate(joint)  # type: ignore[misc]


@functools.cache
def experts_class(own: type) -> Any:
    return standing(Experts, own, (experts_class, own))


def is_experts(module: Any, own: Any) -> bool:
    return is_of_transformers(own) and hasattr(own, "_apply_gate") and "act_fn" in module._modules


@torch.no_grad()
def why_no_experts(module: Any, own: Any) -> str:
    """Why experts' gate is not ours: what it computes."""
    if not isinstance(module.act_fn, ActivationLike):
        kind = activation_class_for(module.act_fn, type(module.act_fn))
        if kind is None:
            return "its activation is none of gpulayers'"
    else:
        kind = type(module.act_fn)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    try:
        theirs = own._apply_gate(module, x)
    except Exception as error:
        return f"its gate fails on a random input: {error}"
    same = theirs.shape == (3, 4) and torch.allclose(theirs, gated(x, activation=kind._activation), 1e-5, 1e-5)
    return "" if same else "on a random input its gate computes something else"


def why_derived(own: Any) -> str:
    """Why a class of transformers that derives from one of torch.nn's is left."""
    code = getattr(inspect.unwrap(own.forward), "__code__", None)
    if is_of_transformers(own) and code is not None and "forward" not in code.co_names and "weight" in code.co_names:
        return "its forward reads its weight by itself, which is an index or a slice"
    return ""


# --- attention and losses --------------------------------------------------------------------------------------------


def patch_model(model: nn.Module) -> dict[str, str]:
    """{name of a model of transformers within ``model``: what it calls now, or why not}."""
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    found: dict[str, str] = {}
    within: set[int] = set()
    if not isinstance(base, type):
        return {}
    models: list[tuple[str, Any]] = [(name, m) for name, m in model.named_modules() if isinstance(m, base)]
    for name, module in models:
        before = vars(module).setdefault(_BEFORE, {})
        said = [_with_loss(module, before)]
        if id(module) not in within:
            within |= {id(m) for m in module.modules()}
            said.append(_with_attention(module, before))
        found[name] = "; ".join(filter(None, said))
    return {name: said for name, said in found.items() if said}


def heads(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name of a model of transformers whose loss is ours, its last layer)."""
    for name, module in model.named_modules():
        if "loss" in vars(module).get(_BEFORE, ()):
            yield name, module.get_output_embeddings()  # type: ignore[operator]


def unpatch_module(module: nn.Module) -> None:
    before = vars(module).pop(_BEFORE, {})
    if "attention" in before:
        _configured(module, {attention.NAME: before["attention"]})
    if "loss" in before:
        vars(module).pop("_loss_function", None)
        vars(module).update(before["loss"])


def _with_attention(model: Any, before: dict) -> str:
    """The model's configuration becomes its own, so that others made of the same one keep their attention."""
    try:
        attention.register_attention()
    except ImportError as error:
        return f"attention stays: this version of transformers has no interface for it ({error})"
    if not getattr(model, "_can_set_attn_implementation", bool)():
        return "attention stays: the model does not call it by transformers' interface"
    names = {name for m in model.modules() if (name := _implementation(m))}
    if names <= {attention.NAME}:
        return ""
    if len(names) > 1 or not names <= {"eager", "sdpa"}:
        return f"attention stays: it is {', '.join(sorted(names))}, which was chosen"
    (name,) = names
    memo: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if hasattr(config, "_attn_implementation"):
            vars(module)["config"] = copy.deepcopy(config, memo)
    before["attention"] = name
    _configured(model, {name: attention.NAME})
    return f"attention by attn_implementation={attention.NAME!r}, before {name!r}"


def _implementation(module: Any) -> Any:
    return getattr(vars(module).get("config"), "_attn_implementation", None)


def _configured(model: nn.Module, names: dict[str, str]) -> None:
    """Configurations within the model, those within these too, get the name for the one that they have."""
    waiting = [config for m in model.modules() if (config := vars(m).get("config")) is not None]
    seen: set[int] = set()
    while waiting:
        config = waiting.pop()
        if id(config) in seen:
            continue
        seen.add(id(config))
        own = vars(config).get("_attn_implementation_internal")
        if own in names:
            config._attn_implementation_internal = names[own]
        waiting += [c for key in getattr(config, "sub_configs", ()) if (c := getattr(config, key, None)) is not None]


def _with_loss(model: Any, before: dict) -> str:
    loss = getattr(type(model), "loss_function", None)
    if not isinstance(loss, property) or "loss" in before:
        return ""
    mapped = sys.modules.get("transformers.loss.loss_utils")
    mapping = vars(mapped or object).get("LOSS_MAPPING", {})
    kind = getattr(model, "loss_type", None)
    if kind not in mapping and model.get_output_embeddings() is not None:
        kind = "ForCausalLM"  # as the property has it
    f = vars(model).get("_loss_function") or mapping.get(kind)
    ours = _loss(f) if inspect.isfunction(f) else None
    if ours is None:
        return ""
    before["loss"] = {k: v for k, v in vars(model).items() if k == "_loss_function"}
    vars(model)["_loss_function"] = ours
    return f"loss by {cross_entropy.__name__}"


class _Loss:
    """A loss of transformers whose cross entropy is ours; copies in another process make it again."""

    def __init__(self, f: Any):
        self.theirs, self.ours = f, rebuilt(f, {"fixed_cross_entropy": _fixed_cross_entropy})

    def __call__(self, *args: Any, **named: Any) -> Tensor:
        return self.ours(*args, **named)

    def __reduce__(self) -> Any:
        return _loss, (self.theirs,)

    def __deepcopy__(self, memo: Any) -> _Loss:
        return self


@functools.cache
def _loss(f: Any) -> Any:
    """None where it has no cross entropy that we know."""
    theirs = f.__globals__.get("fixed_cross_entropy")
    known = "fixed_cross_entropy" in f.__code__.co_names and _agree(_losses, theirs, _fixed_cross_entropy)
    return _Loss(f) if known else None


def _fixed_cross_entropy(
    source: Any, target: Tensor, num_items_in_batch: Any = None, ignore_index: int = -100, **kwargs: Any
) -> Tensor:
    """The mean over the targets that are not ignored, or their sum by ``num_items_in_batch``."""
    found = functools.partial(source.loss, target) if isinstance(source, Logits) else None
    found = found or functools.partial(cross_entropy, source, target)
    if num_items_in_batch is None:
        return found(ignore_index=ignore_index, reduction="mean")
    loss = found(ignore_index=ignore_index, reduction="sum")
    return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)


def _losses(random: torch.Generator, f: Any) -> list[Tensor]:
    x, y = torch.randn(6, 5, generator=random), torch.tensor([0, 4, -100, 2, 1, 1])
    return [f(x, y), f(x, y, 7), f(x, y.clamp(0), num_items_in_batch=torch.tensor(3), ignore_index=1)]


# --- functions -------------------------------------------------------------------------------------------------------


def _served(name: str, f: Any) -> Any:
    """Our function for one of a model's file."""
    if not inspect.isfunction(f) or not f.__module__.startswith("transformers."):
        return None
    if list(inspect.signature(f).parameters)[:4] == ["q", "k", "cos", "sin"] and _agree(
        _turns, f, apply_rotary_pos_emb
    ):
        return apply_rotary_pos_emb
    return None


def _turns(random: torch.Generator, f: Any) -> list[Tensor]:
    """Of tables with every angle twice, as the models' own: what else a function does with others is not asked for."""
    q, k = (torch.randn(2, heads, 3, 8, generator=random) for heads in (4, 2))
    angles = torch.randn(2, 3, 4, generator=random)
    cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))
    return [*f(q, k, cos, sin), *f(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)]


@functools.cache
def _agree(call: Any, theirs: Any, ours: Any) -> bool:
    """Whether both give the same numbers."""
    try:
        with torch.no_grad():
            truth, found = (call(torch.Generator().manual_seed(0), f) for f in (theirs, ours))
    except Exception:
        return False
    eps = 16 * torch.finfo(torch.float32).eps
    return all(
        a.shape == b.shape and a.dtype is b.dtype and bool(((a - b).abs() <= eps * a.abs().max()).all())
        for a, b in zip(truth, found, strict=True)
    )
