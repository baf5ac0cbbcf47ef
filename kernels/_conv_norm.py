"""A convolution's and a batch norm's launchers, one after the other: what is common on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpulayers.arrays import Spec, compute_dtype

CONVS = ("x", "weight", "bias")
OURS = {"x": "conv", "weight": "gamma", "bias": "beta"}
"""What batch norm's inputs are called by the op of both."""


def norms(needs: tuple) -> tuple[str, ...]:
    """The gradients that are wanted of batch norm, by its names. Σ dz, its bias's, gives the convolution's bias its own."""
    wanted = dict(
        x=any(n in needs for n in CONVS),
        weight="gamma" in needs,
        bias="beta" in needs or "bias" in needs,
    )
    return (*[n for n, is_wanted in wanted.items() if is_wanted], *["residual"] * ("residual" in needs))


def saved_by_both(saved: dict[str, Any], needs: tuple, x: Any, weight: Any, bias: Any) -> dict[str, Any]:
    """What batch norm saves, by the names of the op of both, and what its input was made of."""
    found = {OURS.get(k, k): a for k, a in saved.items()}
    if any(n in needs for n in CONVS):
        found |= {"x": x, "weight": weight}
    return found | ({"bias": bias} if "bias" in needs else {})


def backward(norm: Callable, conv: Callable, of_bias: Callable, saved: dict, inputs: tuple, needs: tuple) -> tuple:
    """The gradients of the op of both.

    norm: (what batch norm saved, specs of its inputs but the first, its needs) → its gradients. conv: (dc, specs of its
    inputs, its needs) → its gradients. of_bias: (Σ dz, "bias" or "beta", its spec) → that gradient.
    """
    sums = Spec((saved["conv"].shape[1],), compute_dtype(inputs[0].dtype)) if "bias" in needs else inputs[4]
    kept = {theirs: saved[n] for theirs, n in OURS.items() if n in saved}
    kept |= {k: saved[k] for k in ("mean", "rstd", "y", "residual") if k in saved}
    dc, dgamma, total, _, _, dresidual = norm(kept, (None, inputs[3], sums, *inputs[5:]), norms(needs))
    dx = dweight = None
    wanted = tuple([n for n in ("x", "weight") if n in needs])
    if wanted:
        dx, dweight, *_ = conv(dc, (*inputs[:3], None, None), wanted)
    dbias, dbeta = (of_bias(total, k, inputs[i]) if k in needs else None for k, i in (("bias", 2), ("beta", 4)))
    return dx, dweight, dbias, dgamma, dbeta, None, None, dresidual
