"""An op of your own with a Triton kernel of your own, in one file: y = x · |x|.

Run it: it checks the kernel against the definition (interpreted where there is no GPU), then the layer.
"""

import triton
import triton.language as tl

import gpulayers as gl
from gpulayers.arrays import namespace, up
from gpulayers.definition import Rule
from gpulayers.ops._op import Op, require_float
from gpulayers.testing import check_layer, check_op

# --- the definition ---


def signed_square_rule(x, *, needs=()):
    require_float("x", x)
    return Rule({"y": x.like()}, {"x": x} if needs else {})


def signed_square_forward(x, *, needs=()):
    """y = x |x|; any shape."""
    v = up(x)
    return ((v * namespace(v).abs(v)).astype(x.dtype),), {"x": x} if needs else {}


def signed_square_backward(dys, saved, *, inputs, needs):
    """dx = 2 |x| dy."""
    (dy,), x = dys, saved["x"]
    return ((2 * namespace(x).abs(up(x)) * up(dy)).astype(x.dtype),)


# --- the kernels; a module of its own in a larger project ---


@triton.jit
def _signed_square_kernel(x, dy, out, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + at, at < N, other=0.0).to(tl.float32)
    if dy is None:
        r = v * tl.abs(v)
    else:
        r = 2 * tl.abs(v) * tl.load(dy + at, at < N, other=0.0).to(tl.float32)
    tl.store(out + at, r.to(out.dtype.element_ty), at < N)


def _launch(x, dy, empty):
    x, dy = x.contiguous(), None if dy is None else dy.contiguous()
    out = empty(x.shape, x.dtype)
    if x.numel():
        _signed_square_kernel[(triton.cdiv(x.numel(), 1024),)](x, dy, out, x.numel(), BLOCK=1024)
    return out


class Kernels:
    """Stands for a module; ``kernels={"triton": "its.name"}`` would import that at first use."""

    @staticmethod
    def signed_square_forward(x, *, needs=(), empty):
        return (_launch(x, None, empty),), {"x": x} if needs else {}

    @staticmethod
    def signed_square_backward(dys, saved, *, inputs, needs, empty):
        return (_launch(saved["x"], dys[0], empty),)


signed_square = Op(signed_square_rule, signed_square_forward, signed_square_backward, kernels={"triton": Kernels})


@gl.register
class SignedSquare(gl.OpLayer):
    op = signed_square


if __name__ == "__main__":
    import numpy as np

    x = np.random.default_rng(0).standard_normal((5, 300))
    print("op:", check_op(signed_square, x, numeric=False))
    print("layer:", check_layer(SignedSquare(), (None, 7)))
