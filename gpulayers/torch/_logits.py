"""Logits of a Hugging Face model in training, which nobody but its loss reads: they are made in parts, within the loss.

The last layer gives an object that knows what it would compute. The loss takes its input instead. Whatever else is done with
the object computes the logits after all, all of them, as the layer would have: nothing is ever another number. Where that is not
possible any more, for the weight has changed since, it raises.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gpulayers.torch import _autocast, _head_loss
from gpulayers.torch._acts import is_bare
from gpulayers.torch._arguments import held
from gpulayers.torch._linear_cross_entropy import _linear_cross_entropy
from gpulayers.torch._op import in_dynamo
from gpulayers.torch._standing import Above, standing
from gpulayers.torch.linear import Linear, linear
from gpulayers.torch.loss import cross_entropy


class Logits:
    """linear(x, weight, bias), not computed; ``rows``: as a matrix, ``wide``: in float32. Else as the tensor that it stands for."""

    def __init__(self, x: Tensor, head: Any, rows: bool = False, wide: bool = False):
        self._x, self._head, self._rows, self._wide = x, head, rows, wide
        self._weight, self._bias = held(head, "weight"), held(head, "bias")
        self._versions = x._version, self._weight._version
        device = x.device.type
        self._cast = (device, torch.get_autocast_dtype(device), _autocast.is_on(device))
        self._made: Tensor | None = None

    @property
    def made(self) -> Tensor:
        """The logits. RuntimeError where their weight or input is not what it was."""
        if self._made is None:
            if (self._x._version, self._weight._version) != self._versions or held(
                self._head, "weight"
            ) is not self._weight:
                rule = "they are read before the weight changes, or patch(model, logits=True)"
                raise RuntimeError(
                    f"logits that patch(model, logits=False) left out: the rule is that {rule}; it has changed"
                )
            device, dtype, enabled = self._cast
            with torch.autocast(device, dtype, enabled), torch.enable_grad():
                found = linear(self._x, self._weight, self._bias)
            found = found.float() if self._wide else found
            self._made = found.view(-1, found.shape[-1]) if self._rows else found
        return self._made

    def loss(self, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
        """Their cross entropy, of which there are never all at once."""
        x, weight, bias = self._x.flatten(0, -2), self._weight, self._bias
        if self._made is not None or not self._rows or target.dim() != 1 or target.shape[0] != x.shape[0]:
            return cross_entropy(self.made, target, ignore_index=ignore_index, reduction=reduction)
        if self._cast[2]:
            x, weight, bias = _autocast.cast(_autocast.LOWER, (x, weight, bias), 3)
        how = ignore_index, 0.0, reduction, 0.0, 0.0, x.dtype.itemsize == 2 and (self._wide or self._cast[2])
        return _linear_cross_entropy(x, weight, target, bias, None, *how)

    # --- what a loss asks, without computing them --------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        lead = (self._x.shape[:-1].numel(),) if self._rows else self._x.shape[:-1]
        return torch.Size((*lead, self._weight.shape[0]))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def device(self) -> torch.device:
        return self._x.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self._wide else self._cast[1] if self._cast[2] else self._x.dtype

    def float(self) -> Logits:
        return self if self.dtype is torch.float32 else self._again(self._rows, True)

    def view(self, *shape: Any) -> Any:
        return self._again(True, self._wide) if shape == (-1, self.shape[-1]) else self.made.view(*shape)

    def _again(self, rows: bool, wide: bool) -> Logits:
        if self._made is not None:
            found = self._made.float() if wide else self._made
            return found.view(-1, self.shape[-1]) if rows else found  # type: ignore[return-value]
        other = Logits(self._x, self._head, rows, wide)
        other._cast, other._versions = self._cast, self._versions
        return other

    # --- all else computes them ----------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__array__":
            raise AttributeError(name)
        return getattr(self.made, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda a: a.made if isinstance(a, Logits) else a, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<logits {list(self.shape)} that were not computed>" if self._made is None else repr(self._made)

    def __reduce__(self) -> Any:
        return torch.clone, (self.made.detach(),)


def _of_made(name: str) -> Any:
    return lambda self, *args: getattr(self.made, name)(*[a.made if isinstance(a, Logits) else a for a in args])


_ARITHMETIC = "add radd sub rsub mul rmul truediv rtruediv floordiv mod pow rpow matmul rmatmul lt le gt ge eq ne"
_OTHERS = "neg abs len iter getitem setitem bool int index float contains"
for _name in f"{_ARITHMETIC} {_OTHERS}".split(" "):
    setattr(Logits, f"__{_name}__", _of_made(f"__{_name}__"))
Logits.__hash__ = object.__hash__  # type: ignore[method-assign]


class WithoutLogits(Above):
    """Stands before the class of a model's last layer."""

    def forward(self, input: Tensor) -> Any:
        layer: Any = self
        plain = super().forward  # type: ignore[misc]
        if in_dynamo() or not (layer.training and torch.is_grad_enabled() and is_bare(layer)):
            return plain(input)
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if _autocast.is_on(device) else input.dtype
        weight = layer._parameters.get("weight")
        whole = type(weight) is torch.nn.Parameter and type(input) is Tensor and input.dim() > 1
        if not whole or dtype is torch.float16 or layer.out_features < _head_loss.LEAST:
            return plain(input)
        return Logits(input, layer)


@functools.cache
def without_logits(own: Any) -> Any:
    """The class before that of a linear layer."""
    return standing(WithoutLogits, own, (without_logits, own))


def leaves_out(head: Any) -> bool:
    """Whether a last layer's logits may be left out."""
    return type(head) is Linear or isinstance(head, WithoutLogits)
