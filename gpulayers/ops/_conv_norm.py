"""Convolution, batch norm of what comes out, and what may follow that: what convolutional networks say in a row, as one op."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, compute_dtype, spec, up
from gpulayers.definition import Rule, RuleError
from gpulayers.ops._batch_norm import batch_norm_backward, batch_norm_forward, batch_norm_rule
from gpulayers.ops._op import Op
from gpulayers.ops.conv import conv_backward, conv_forward, conv_rule

_CONVS = ("x", "weight", "bias")
_OURS = {"x": "conv", "weight": "gamma", "bias": "beta"}
"""What batch norm's inputs are called here."""


def _norms(needs: tuple) -> tuple[str, ...]:
    """The gradients that are wanted of batch norm, by its names. Σ dz, its bias's, gives the convolution's bias its own."""
    found = ["x"] * any(n in needs for n in _CONVS)
    found += [theirs for theirs, n in _OURS.items() if n in needs]
    if "bias" in needs and "beta" not in needs:
        found.append("bias")
    return (*found, *["residual"] * ("residual" in needs))


def _saved(norms: dict[str, Any], needs: tuple, x: Any, weight: Any, bias: Any) -> dict[str, Any]:
    """What batch norm saves, by our names, and what its input was made of."""
    saved = {_OURS.get(k, k): a for k, a in norms.items()}
    if any(n in needs for n in _CONVS):
        saved |= {"x": x, "weight": weight}
    return saved | ({"bias": bias} if "bias" in needs else {})


def conv_batch_norm_rule(
    x: Spec,
    weight: Spec,
    bias: Spec | None = None,
    gamma: Spec | None = None,
    beta: Spec | None = None,
    running_mean: Spec | None = None,
    running_var: Spec | None = None,
    residual: Spec | None = None,
    *,
    needs: tuple = (),
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    training: bool = False,
    eps: float = 1e-5,
    activation: str | None = None,
) -> Rule:
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    convolved = conv_rule(x, weight, bias, **how)
    then: dict[str, Any] = {"training": training, "eps": eps, "activation": activation}
    given = gamma, beta, running_mean, running_var, residual
    try:
        norm = batch_norm_rule(convolved.outputs["y"], *given, needs=_norms(needs), **then)
    except RuleError as error:
        error.argument = _OURS.get(error.argument, error.argument)
        raise
    assert convolved.options is not None and norm.options is not None
    saved = _saved(norm.saved, needs, x, weight, bias) if needs else {}
    options = {k: convolved.options[k] for k in how} | norm.options
    return Rule(norm.outputs, saved, options, {"residual": norm.outputs["y"]})


def conv_batch_norm_forward(
    x: Any,
    weight: Any,
    bias: Any = None,
    gamma: Any = None,
    beta: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    residual: Any = None,
    *,
    needs: tuple = (),
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple[tuple, dict]:
    """y = f((c − mean) rstd · gamma + beta + residual), with c = conv(x, weight) + bias and rstd = 1 / √(var + eps).

    x, weight, bias, stride, padding, dilation, groups: conv's. gamma, beta, running_mean, running_var: batch_norm's weight,
    bias and statistics, (O,), of x's dtype, or float32 for 16-bit x; they, residual (of c's shape and dtype), training,
    momentum, eps and the activation f are as there. c has x's dtype. Returns y with c's shape and memory order.
    Raises ShapeError, and ArgumentError for one value per channel.
    """
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    then: dict[str, Any] = {"training": training, "momentum": momentum, "eps": eps, "activation": activation}
    (c,), _ = conv_forward(x, weight, bias, **how)
    given = c, gamma, beta, running_mean, running_var, residual
    outputs, saved = batch_norm_forward(*given, needs=_norms(needs), **then)
    return outputs, _saved(saved, needs, x, weight, bias) if needs else {}


def conv_batch_norm_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    groups: int,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple:
    """batch_norm's gradients, and conv's of dc. In training dbias = 0, since the mean takes bias away again; by the running
    statistics it is Σ dc = gamma · rstd · Σ dz."""
    c, mean = saved["conv"], inputs[5]
    gamma, beta, residual = inputs[3], inputs[4], inputs[7]
    sums = Spec((c.shape[1],), compute_dtype(c.dtype))
    kept = {theirs: saved[n] for theirs, n in _OURS.items() if n in saved}
    kept |= {k: saved[k] for k in ("mean", "rstd", "y", "residual") if k in saved}
    norms = batch_norm_backward(
        dys,
        kept,
        inputs=(spec(c), gamma, sums, mean, mean, residual),
        needs=_norms(needs),
        training=training,
        eps=eps,
        activation=activation,
    )
    dc, dgamma, dbeta, _, _, dresidual = norms
    dx = dweight = dbias = None
    wanted = tuple([n for n in ("x", "weight") if n in needs])
    if wanted:
        how: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        kept = {k: saved[k] for k in ("x", "weight")}
        dx, dweight, *_ = conv_backward((dc,), kept, inputs=(*inputs[:3], None, None), needs=wanted, **how)
    if "bias" in needs:
        scale = 0 if training or mean is None else saved["rstd"]
        scale = scale if gamma is None else scale * up(saved["gamma"])
        dbias = (scale * dbeta).astype(inputs[2].dtype, copy=False)
    dbeta = dbeta.astype(beta.dtype, copy=False) if "beta" in needs else None
    return dx, dweight, dbias, dgamma, dbeta, None, None, dresidual


conv_batch_norm = Op(
    conv_batch_norm_rule,
    conv_batch_norm_forward,
    conv_batch_norm_backward,
    differentiable=(*_CONVS, "gamma", "beta", "residual"),
    updates=("running_mean", "running_var"),
    dynamic=("momentum",),
    family="norm",
    rounds=True,
)
