"""Any model's layers replaced in place: a module gets the class of its drop-in, and stays the object that it is.

So parameters, buffers, hooks, tied and shared modules, optimizers and every other reference stay the very same. The
drop-ins are found by name: a class of ``gpulayers.torch`` replaces the class of ``torch.nn`` that it derives from and
shares its name with.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn

from gpulayers._table import table
from gpulayers.torch import _activation_like, _flops, _layer_norm_2d, _norm_act, _rms_norm, _transformers
from gpulayers.torch._activation_like import ActivationLike, Derived
from gpulayers.torch._chains import is_link, why_unlinked
from gpulayers.torch._fuse import CUT, PLAN, Fused, Unfusable, cut_of, fused_class, plan_of
from gpulayers.torch._layout import CHANNELS_LAST
from gpulayers.torch._logits import leaves_out, without_logits
from gpulayers.torch._norm_act import NormAct
from gpulayers.torch._op import _PLAIN
from gpulayers.torch._rebuilt import Rebuilt
from gpulayers.torch._rms_norm import RMSNormLike
from gpulayers.torch._standing import Above, Standing, alias, without_above
from gpulayers.torch._streams import Streamed, forget, keep_readers, streamed
from gpulayers.torch.conv import Convolution
from gpulayers.torch.loss import CrossEntropyLoss

_PACKAGE = "gpulayers.torch"
_MARK = "_gpulayers_patched"
"""Where a patched module keeps the class that it had: in its ``__dict__``, so that copies have it too."""
_LEAF = nn.Module.__module__
"""A drop-in's ``__module__``, of the object and not of its class: torch.fx keeps modules of torch.nn whole."""


@dataclass
class Report:
    """What ``patch`` did; print it for a table. Each is by the module's name in the model."""

    replaced: dict[str, type] = field(default_factory=dict)
    """The class that the module has now (FSDP and parametrizations put their own above it)."""
    left: dict[str, str] = field(default_factory=dict)
    """Why a module that computes something is as it was."""
    called: dict[str, str] = field(default_factory=dict)
    """What a model of Hugging Face's calls in the place of its own: attention, the loss."""
    bypassed: dict[str, str] = field(default_factory=dict)
    """Why a parent computes something else than the module's forward, always or (then it is replaced too) at times."""
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What runs as one op in the module's forward ("bn1 → relu"); ``print(gt.source(module))`` shows that."""
    lowered: dict[str, str] = field(default_factory=dict)
    """Norms that only convolutions and linear layers of the same forward read: under autocast on a GPU they write the 16 bits
    that those take, where torch has them in float32."""
    joined: dict[str, str] = field(default_factory=dict)
    """Convolutions of rows whose input others read, too, as a block's shortcut does: their kernel of dx adds what comes back."""
    unfused: dict[str, str] = field(default_factory=dict)
    """Why the forward of a module with layers to fuse stays as it is; and why a convolution, or a norm of channels, runs
    alone."""
    turned: dict[str, str] = field(default_factory=dict)
    """The memory format that a convolution's weight has now; what goes into it follows."""
    _kinds: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [(name, self._kinds[name], "replaced", f"by {_title(c)}") for name, c in self.replaced.items()]
        rows += [(name, self._kinds[name], "calls", what) for name, what in self.called.items()]
        rows += [(name, self._kinds[name], "bypassed", why) for name, why in self.bypassed.items()]
        rows += [(name, self._kinds[name], "left", why) for name, why in self.left.items()]
        rows += [(name, self._kinds[name], "turned", f"to {found}") for name, found in self.turned.items()]
        rows += [(name, self._kinds[name], "fused", ", ".join(found)) for name, found in self.fused.items()]
        rows += [(name, self._kinds[name], "lowered", why) for name, why in self.lowered.items()]
        rows += [(name, self._kinds[name], "joined", why) for name, why in self.joined.items()]
        rows += [(name, self._kinds[name], "not fused", why) for name, why in self.unfused.items()]
        return table(("module", "class", "", "why"), [(name or "(the model)", *rest) for name, *rest in rows])

    def __repr__(self) -> str:
        fused = f", {sum(map(len, self.fused.values()))} rows fused" if self.fused else ""
        fused += f", {len(self.turned)} turned to channels last" if self.turned else ""
        return f"<{len(self.replaced)} replaced, {len(self.left)} left, {len(self.bypassed)} bypassed{fused}>"


def patch(
    model: nn.Module, fuse: bool = False, memory_format: torch.memory_format | None = None, logits: bool = True
) -> Report:
    """Replace every layer in ``model`` (itself too) that gpulayers.torch has a drop-in for, in place.

    Replaced are modules whose class is exactly torch.nn's (under FSDP2 or parametrizations too), and norms in the manner
    of Hugging Face's LlamaRMSNorm, T5LayerNorm and GemmaRMSNorm: they have one weight of one dimension and a
    ``variance_epsilon`` or ``eps``, and on a random input their forward agrees with ours; so, too, LayerNorm2d in
    torchvision's and timm's manner, and BatchNormAct in timm's. Of models of Hugging Face's transformers also attention,
    rotary positions, activations, losses and what else their forwards call of torch.nn.functional (``_transformers.py``).
    Left alone are other classes derived from torch.nn's, a ``forward`` set on the instance, lazy modules that are not
    initialised, scripted ones, and what is quantised or marked for it (torch.ao's quantization looks for torch.nn's exact
    classes: quantize first).

    fuse: also let layers that the model runs in a row be one op each: convolution → batch norm (+ residual) → activation
    and its parts, convolution, group or instance norm (+ residual) or linear → activation, sum → layer or RMS norm, a gated unit's activation
    and product; two or three linear layers of one input be one product; and a last linear layer and the cross entropy of
    what it gives, which a module's forward computes, one op that never holds all logits (``_head_loss.py``). Rows are found in
    each module's own forward, traced by torch.fx; see ``_fuse.py`` for what is refused. Names, parameters and state_dict
    stay. A fused row may keep what it gives for its backward, so torch refuses a backward after it was written into
    (``y += 1``). Norms that only convolutions and linear layers read write autocast's 16 bits on a GPU (``_lowered.py``).
    Patch again after a change of what a forward depends on.

    memory_format: of convolutions' weights of images and volumes; what goes into one follows its weight, as in torch, so
    the first convolution of a model turns the images. By default channels last for those on a GPU, where the kernels want
    it; ``torch.preserve_format`` keeps all as it is, ``torch.channels_last`` turns them on a CPU too. Images and volumes
    have their formats, whichever is named.

    logits: False says that nobody reads the logits that a model of Hugging Face's gives in training beside its loss, which
    then makes them in parts (``linear_cross_entropy``). ``outputs.logits`` is no tensor then, but computes them where
    something is done with it, and raises once the weight has changed. In evaluation all is as ever.

    ``torch.jit.script`` takes a patched model, as torch.nn's modules; it puts those into the model that it is given.
    ``unpatch`` restores the classes. Raises TypeError for what is no module, ValueError for a
    memory_format that is no torch.memory_format.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model: the rule is a torch.nn.Module; got {type(model).__name__}")
    if not isinstance(memory_format, torch.memory_format | None):
        rule = "None, torch.channels_last, torch.contiguous_format or torch.preserve_format"
        raise ValueError(f"patch: memory_format: the rule is {rule}; got {memory_format!r}")
    _flops.tell()
    report, bypassed = Report(), _bypassed(model)
    for name, module in model.named_modules():
        own = _own_class(module)
        report._kinds[name] = own.__name__
        always, why_bypassed = bypassed.get(module, (False, ""))
        if why_bypassed:
            report.bypassed[name] = why_bypassed
        if always:
            continue
        replacement, why = _replacement(module, own)
        if replacement is not None:
            vars(module).update({_MARK: own} if module._modules else {_MARK: own, "__module__": _LEAF})
            module.__class__ = _rebased(type(module), own, replacement)
            report.replaced[name] = replacement
        elif why and not why_bypassed:
            report.left[name] = why
    report.called |= _transformers.patch_model(model)
    if not logits:
        for name, head in _transformers.heads(model):
            if leaves_out(head):
                own = _own_class(head)
                if not isinstance(head, Above):
                    head.__class__ = _rebased(type(head), own, without_logits(own))
                said = "no logits in training, of which its loss makes a part at a time"
                report.called[name] = "; ".join(filter(None, (report.called.get(name), said)))
    if memory_format is not torch.preserve_format:
        _turn(model, report, memory_format)
    if fuse:
        for name, module in model.named_modules():
            _fuse_rows(name, module, report)
    return report


def _turn(model: nn.Module, report: Report, memory_format: torch.memory_format | None) -> None:
    """Weights of convolutions in a memory format; None: channels last where they are on a GPU."""
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if not isinstance(module, Convolution) or type(weight) is not nn.Parameter:
            continue
        if weight.dim() not in CHANNELS_LAST or not (memory_format or weight.is_cuda):
            continue
        own = CHANNELS_LAST[weight.dim()] if memory_format in (None, *CHANNELS_LAST.values()) else memory_format
        weight.data = weight.data.contiguous(memory_format=own)
        report.turned[name] = str(own).removeprefix("torch.")


def _fuse_rows(name: str, module: Any, report: Report) -> None:
    own: Any = module._own if isinstance(module, Fused) else _own_class(module)
    plan, refused = None, "its parent is scripted" if isinstance(module, torch.jit.ScriptModule) else ""
    if "forward" in vars(module):
        refused = "its parent's forward is set on the instance"
    if not refused:
        try:
            plan = plan_of(module, own)
        except Unfusable as error:
            report.unfused[name] = str(error)
            refused = f"its parent's forward stays as it is: {error}"
        if plan is None or not plan.source:
            _let_stream(name, module, report)
    left = plan and plan.left
    for child, layer in module._modules.items():
        if is_link(layer) and (why := why_unlinked(child, layer, left, module, refused)):
            report.unfused[f"{name}.{child}" if name else child] = why
    if plan is not None and plan.source:
        if plan.rows:
            report.fused[name] = plan.rows
        why = "under autocast on a GPU it writes the 16 bits that its readers take"
        report.lowered |= {f"{name}.{norm}" if name else norm: why for norm in plan.lowered}
        why = "where images lie channels last, its kernel of dx adds what comes back from all else that reads its input"
        report.joined |= {f"{name}.{conv}" if name else conv: why for conv in plan.joined}
        vars(module)[PLAN] = plan
        for one in (module, *[module._modules[child] for child in plan.cuts]):
            its = _own_class(one)
            if not isinstance(one, Fused) and type(one) is not CrossEntropyLoss:
                one.__class__ = _rebased(type(one), its, fused_class(its))
            if one is not module and isinstance(one, Fused):
                vars(one)[CUT] = cut_of(one)


def _let_stream(name: str, module: Any, report: Report) -> None:
    """The rows of a block of transformers that torch.fx cannot trace."""
    own = module._own if isinstance(module, Streamed) else _own_class(module)
    kind = streamed(module, own) if _transformers.is_of_transformers(own) else None
    if kind is None:
        return
    if not isinstance(module, Streamed):
        module.__class__ = _rebased(type(module), own, kind)
    keep_readers(module, own)
    report.fused[name] = kind._rows
    report.unfused.pop(name, None)


def unpatch(model: nn.Module) -> None:
    """Give every module in ``model`` that ``patch`` replaced its class again; all else stays as it is now."""
    for module in model.modules():
        _transformers.unpatch_module(module)
        if isinstance(module, Fused):
            for kept in (PLAN, CUT):
                vars(module).pop(kept, None)
            module.__class__ = _rebased(type(module), fused_class(module._own), module._own)
        if isinstance(module, Above):
            forget(module)
            module.__class__ = _rebased(type(module), *without_above(type(module)))
        own = vars(module).pop(_MARK, None)
        if own is None:
            continue
        vars(module).pop("__module__", None)
        made = (c for c in type(module).__mro__ if vars(c).get("_own") is own)
        replacement = drop_ins().get(own) or next(made, None)
        if replacement is not None and isinstance(module, replacement):
            module.__class__ = _rebased(type(module), replacement, own)


@functools.cache
def drop_ins() -> dict[type, Any]:
    """{torch.nn's class: gpulayers.torch's}."""
    here = vars(sys.modules[_PACKAGE])
    pairs = [(getattr(nn, name, None), c) for name, c in here.items() if isinstance(c, type)]
    return {theirs: c for theirs, c in pairs if theirs is not None and issubclass(c, theirs)}


def make_known() -> None:
    """Let ``torch.jit.script`` see each drop-in as torch.nn's module over the same attributes, and torch.fx as one of
    torch.nn's, which it does not look into."""
    for theirs, ours in drop_ins().items():

        def new(cls: type, *args: Any, ours: type = ours, **named: Any) -> Any:
            module: Any = object.__new__(cls)
            if cls is ours:
                vars(module)["__module__"] = _LEAF
            return module

        def prepare(self: Any, ours: type = ours, theirs: Any = theirs) -> Any:
            return alias(self, theirs) if type(self) is ours else self

        ours.__prepare_scriptable__, ours.__new__ = prepare, staticmethod(new)  # type: ignore[attr-defined]


def _title(c: Any) -> str:
    if issubclass(c, Rebuilt):
        return f"its forward over {_PACKAGE}'s {', '.join(c._calls)}"
    if issubclass(c, ActivationLike):
        return f"{_PACKAGE}'s {c._activation}"
    if issubclass(c, Derived):
        return f"its forward over {_PACKAGE}.{c._ours.__name__}"
    by_structure = next((word for kind, word in _STRUCTURES.items() if issubclass(c, kind)), "")
    return f"{_PACKAGE}'s {by_structure}" if by_structure else f"{_PACKAGE}.{c.__name__}"


# --- what is replaced, and what is not -------------------------------------------------------------------------------


def _replacement(module: nn.Module, own: Any) -> tuple[Any, str]:
    """(the class that replaces ``own``, "") or (None, why not); no reason is given for a module that only has others."""
    known = drop_ins()
    if isinstance(module, torch.jit.ScriptModule):
        return None, "it is scripted"
    if own in known.values() or issubclass(own, Standing):
        return None, "it is gpulayers' already"
    if issubclass(own, nn.modules.lazy.LazyModuleMixin):
        return None, "it is not initialised: patch it after its first call"
    found, why = known.get(own), ""
    if found is None:
        found, refuses = _by_structure(module, own)
        found, why = (None, why) if refuses and (why := refuses(module, own)) else (found, "")
    if found is not None:
        why = _not_itself(module, own)
        return (None, why) if why else (found, "")
    base = next((c for c in own.__mro__ if c in known), None)
    if base is not None and not why:
        return None, _transformers.why_derived(own) or f"a class derived from torch.nn.{base.__name__}"
    return None, why or (
        "" if module._modules else _transformers.why_left(module) or f"{_PACKAGE} has no {own.__name__}"
    )


def _not_itself(module: nn.Module, own: type) -> str:
    """Why a module of a class that we know must stay as it is."""
    for name in vars(module):
        if inspect.isfunction(getattr(own, name, None)):
            return f"its {name} is set on the instance"
    if getattr(module, "qconfig", None) is not None:
        return "it is marked for quantisation (qconfig)"
    for name, t in (*module._parameters.items(), *module._buffers.items()):
        if t is not None and type(t) not in _PLAIN and not hasattr(t, "to_local"):  # DTensors have it
            return f"its {name} is a {type(t).__name__}"
    return ""


_CALLING_NONE = (nn.MultiheadAttention, getattr(nn, "LinearCrossEntropyLoss", nn.MultiheadAttention))


def _bypassed(model: nn.Module) -> dict[nn.Module, tuple[bool, str]]:
    """Modules whose parents call something else: (always, why)."""
    found: dict[nn.Module, tuple[bool, str]] = {}
    for parent in model.modules():
        if isinstance(parent, nn.TransformerEncoderLayer):
            why = "in evaluation without gradients TransformerEncoderLayer runs torch's fused layer on its weights"
            replaced = _replacement(parent, _own_class(parent))[0] is not None
            if type(parent).forward is nn.TransformerEncoderLayer.forward and not replaced:
                found |= {child: (False, why) for child in parent.children() if child in _leaves(parent)}
        if isinstance(parent, _CALLING_NONE):
            why = f"{_own_class(parent).__name__} computes with its weights and never calls it"
            found |= {child: (True, why) for child in parent.children()}
    return found


def _leaves(parent: nn.Module) -> list[nn.Module]:
    return [child for child in parent.children() if _own_class(child) in drop_ins()]


# --- classes that torch puts above a module's own: parametrizations, FSDP2, replicate --------------------------------

_rebased_from: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()


def _own_class(module: nn.Module) -> type:
    """The class of a module, below those that torch made for this one."""
    c = type(module)
    while c.__module__.startswith(("torch.nn.utils.parametrize", "torch.distributed.")):
        if getattr(sys.modules.get(c.__module__), c.__name__, None) is c:
            break  # written in torch, not made while running
        c = c.__bases__[-1]
    return c


def _rebased(c: Any, old: type, new: type) -> Any:
    """``c`` with ``new`` below it in the place of ``old``; the class that it came from, if this leads back to it."""
    if c is old:
        return new
    if not issubclass(c, old):
        return c
    before = _rebased_from.get(c)
    if before is not None and issubclass(before, new) and _properties(before) == _properties(c):
        return before
    inside = {k: v for k, v in vars(c).items() if k not in ("__dict__", "__weakref__", "__slotnames__")}
    fresh = type(c)(c.__name__, tuple(_rebased(base, old, new) for base in c.__bases__), inside)
    _rebased_from[fresh] = c
    return fresh


def _properties(c: type) -> set[str]:
    """The tensors that are parametrized."""
    return {name for name, value in vars(c).items() if isinstance(value, property)}


# --- norms by structure ----------------------------------------------------------------------------------------------


def _by_structure(module: nn.Module, own: Any) -> tuple[Any, Any]:
    """(the class for one that is named so, its module and own class → why it is not of that kind); (None, None) for others"""
    if _rms_norm.is_like_one(module, own):
        return _rms_norm.class_for(module, own), _rms_norm.is_no_rms_norm
    if _norm_act.is_named_so(own):
        return _norm_act.norm_act_class(own), _norm_act.is_no_norm_act
    if _layer_norm_2d.is_named_so(own):
        return _layer_norm_2d.layer_norm_2d_class(own), _layer_norm_2d.is_no_layer_norm_2d
    if _activation_like.is_conv1d_like(module, own):
        return _activation_like.conv1d_class(own), _activation_like.is_no_conv1d
    if _transformers.is_experts(module, own):
        return _transformers.experts_class(own), _transformers.why_no_experts
    base = next((c for c in own.__mro__ if c in drop_ins()), None)
    if base is not None:
        return _activation_like.derived_class(own, drop_ins()[base]), None
    return _activation_like.activation_class_for(module, own) or _transformers.forward_class(own), None


_STRUCTURES: dict[type, str] = {
    RMSNormLike: "rms_norm",
    NormAct: "batch_norm",
    _layer_norm_2d.LayerNorm2d: "layer_norm",
    _activation_like.Conv1DLike: "linear",
    _transformers.Experts: "gated, between the products of its experts_implementation",
}
