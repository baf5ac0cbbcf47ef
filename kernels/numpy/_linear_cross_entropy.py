"""Cross entropy of a linear layer's outputs: products by BLAS for some tokens at a time, whose logits become their gradient."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import Spec, float64, guests

from . import _blocks

BYTES = 1 << 24
"""Of the logits that are there at once."""


REFUSED = "float64 and an empty x are left to the definition"


def linear_cross_entropy_refuses(x: Spec, *others: Any, needs: tuple, **options: Any) -> str | None:
    return REFUSED if x.dtype == float64 or x.size == 0 else None


def _single(x: Any) -> Any:
    return None if x is None else x.astype(np.float32, copy=False)


class _Call:
    """A pass over all tokens, in float32."""

    def __init__(
        self, x: np.ndarray, weight: np.ndarray, target: np.ndarray, bias: Any, class_weight: Any, *,
        ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
    ):  # fmt: skip
        self.x, self.weight, self.bias = _single(x).reshape(-1, weight.shape[1]), _single(weight), _single(bias)
        labels = np.asarray(target).reshape(-1)
        self.counts = labels != ignore_index
        self.labels, w = np.where(self.counts, labels, 0), _single(class_weight)
        self.share = (
            self.counts.astype(np.float32) if w is None else np.where(self.counts, w[self.labels], np.float32(0))
        )
        smooth = np.float32(label_smoothing / len(weight))
        self.spread = None if not smooth else np.full(len(weight), smooth) if w is None else smooth * w
        self.keep, self.z_loss, self.softcap = np.float32(1 - label_smoothing), np.float32(z_loss), np.float32(softcap)

    def run(self, scale: Any, needs: tuple) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(losses, gradients); scale: what each loss counts, (N,)."""
        n, classes = len(self.x), len(self.weight)
        losses, grads = np.empty(n, np.float32), {}
        shapes = {"x": self.x.shape, "weight": self.weight.shape, "bias": (classes,)}
        grads = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name in needs}
        rows = max(64, _blocks.block_rows(classes, 4, BYTES))
        for lo in range(0, n, rows):
            part = slice(lo, min(lo + rows, n))
            z = _blocks.product(self.x[part], self.weight.T)
            self._turn(z, part, losses, scale, bool(needs))
            if "x" in grads:
                grads["x"][part] = _blocks.product(z, self.weight)
            if "weight" in grads:
                grads["weight"] += guests.matmul(z.T, self.x[part])
            if "bias" in grads:
                grads["bias"] += z.sum(0)
        return losses, grads

    def _turn(self, z: np.ndarray, part: slice, losses: np.ndarray, scale: Any, grad: bool) -> None:
        """The losses of these tokens; their logits become the gradients."""

        def work(lo: int, hi: int) -> None:
            v, here = z[lo:hi], slice(part.start + lo, part.start + hi)
            labels, counts, share = self.labels[here], self.counts[here], self.share[here]
            if self.bias is not None:
                v += self.bias
            if self.softcap:
                v /= self.softcap
                np.tanh(v, out=v)
                slope = 1 - v * v if grad else None
                v *= self.softcap
            top, nth = v.max(1), np.arange(hi - lo)
            lse = np.log(np.exp(v - top[:, None]).sum(1)) + top
            mass = self.keep * share
            loss = mass * (lse - v[nth, labels])
            if self.spread is not None:
                loss += lse * self.spread.sum() - _blocks.dots(v, self.spread)
                mass = mass + self.spread.sum()
            losses[here] = np.where(counts, loss + self.z_loss * lse * lse, 0)
            if not grad:
                return
            by = np.where(counts, scale[here], np.float32(0))
            v -= lse[:, None]
            np.exp(v, out=v)
            v *= (by * (mass + 2 * self.z_loss * lse))[:, None]
            if self.spread is not None:
                v -= by[:, None] * self.spread
            v[nth, labels] -= by * self.keep * share
            if self.softcap:
                v *= slope

        _blocks.over(len(z), _blocks.block_rows(z.shape[1]), work, elements=z.size)


def _over(a: Any, total: np.float32) -> Any:
    return a / total if total else a * np.float32(np.nan)  # a mean over nothing


def linear_cross_entropy_forward(
    x: np.ndarray,
    weight: np.ndarray,
    target: np.ndarray,
    bias: Any = None,
    class_weight: Any = None,
    *,
    needs: tuple = (),
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    z_loss: float,
    softcap: float,
    wide: bool = False,
) -> tuple[tuple, dict]:
    how = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
    call, kind = _Call(x, weight, target, bias, class_weight, **how), np.float32 if wide else x.dtype
    given = {"x": x, "weight": weight, "target": target, "bias": bias, "class_weight": class_weight}
    saved = {k: v for k, v in given.items() if v is not None and needs}
    if reduction == "none":
        losses, _ = call.run(None, ())
        return (losses.astype(kind, copy=False).reshape(target.shape),), saved
    total = np.float32(call.share.sum(dtype=np.float64) if reduction == "mean" else 1)
    losses, grads = call.run(np.broadcast_to(np.float32(1 if total else np.nan), call.share.shape), needs)
    shapes = {"x": x.shape, "weight": weight.shape, "bias": weight.shape[:1]}
    saved |= {f"d{name}": g.astype(x.dtype, copy=False).reshape(shapes[name]) for name, g in grads.items()}
    saved |= {"total": np.asarray(total)} if needs and reduction == "mean" else {}
    return (np.asarray(_over(losses.sum(dtype=np.float64), total), kind),), saved


def linear_cross_entropy_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    z_loss: float,
    softcap: float,
    wide: bool = False,
) -> tuple:
    (dy,), names = dys, ("x", "weight", "target", "bias", "class_weight")
    if reduction == "none":
        how = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
        call = _Call(*(saved.get(name) for name in names), **how)
        _, grads = call.run(_single(dy).reshape(-1), needs)
    else:
        by = _single(dy) / (saved.get("total") or np.float32(1))  # over nothing they are 0, or NaN already
        grads = {name: saved[f"d{name}"] * by for name in needs}
    return tuple(
        grads[name].astype(s.dtype, copy=False).reshape(s.shape) if name in grads else None
        for name, s in zip(names, inputs)
    )
