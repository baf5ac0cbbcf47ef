"""Convolution, batch norm of what comes out, and what may follow that: what convolutional networks say in a row, as one op."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, spec, up
from gpulayers.definition import Rule, RuleError
from gpulayers.kernels._conv_norm import CONVS, OURS, backward, norms, saved_by_both
from gpulayers.ops._batch_norm import batch_norm_backward, batch_norm_forward, batch_norm_rule
from gpulayers.ops._op import Op
from gpulayers.ops.conv import conv_backward, conv_forward, conv_rule


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
        norm = batch_norm_rule(convolved.outputs["y"], *given, needs=norms(needs), **then)
    except RuleError as error:
        error.argument = OURS.get(error.argument, error.argument)
        raise
    assert convolved.options is not None and norm.options is not None
    saved = saved_by_both(norm.saved, needs, x, weight, bias) if needs else {}
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
    outputs, saved = batch_norm_forward(*given, needs=norms(needs), **then)
    return outputs, saved_by_both(saved, needs, x, weight, bias) if needs else {}


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
    how: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}

    def norm(kept: dict, specs: tuple, wanted: tuple) -> tuple:
        then: dict[str, Any] = {"training": training, "eps": eps, "activation": activation}
        return batch_norm_backward(dys[:1], kept, inputs=(spec(saved["conv"]), *specs[1:]), needs=wanted, **then)

    def conv(dc: Any, specs: tuple, wanted: tuple) -> tuple:
        return conv_backward((dc, *dys[1:]), saved, inputs=specs, needs=wanted, **how)

    def of_bias(total: Any, name: str, like: Spec) -> Any:
        if name == "bias":
            scale = 0 if training or inputs[5] is None else saved["rstd"]
            total = total * (scale if inputs[3] is None else scale * up(saved["gamma"]))
        return total.astype(like.dtype, copy=False)

    return backward(norm, conv, of_bias, saved, inputs, needs)


conv_batch_norm = Op(
    conv_batch_norm_rule,
    conv_batch_norm_forward,
    conv_batch_norm_backward,
    differentiable=(*CONVS, "gamma", "beta", "residual"),
    updates=("running_mean", "running_var"),
    dynamic=("momentum",),
    family="norm",
    joins="x",
    rounds=True,
)
