"""A Triton kernel of your own, in one file: an op with a definition and a kernel, and a layer over it.

Run it: who would compute the op; the kernel held against the definition, its accesses and its machine code checked, with
no GPU; and on a GPU, how fast it is. In CUDA C++: custom_layers/symlog.py.
"""

import numpy as np
import triton
import triton.language as tl
from gpulayers.bench.own import bench_op

import gpulayers as gl
from gpulayers.arrays import Spec, bfloat16
from gpulayers.testing import audit_op, check_layer, check_op
from gpulayers.testing.arena import has_gpu


def forward(x):
    """y = x |x|; any shape."""
    return x * np.abs(x)


def backward(dy, x):
    return 2 * np.abs(x) * dy


@triton.jit
def _signed_square_kernel(x, dy, out, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + at, at < N, other=0.0).to(tl.float32)
    factor = v if dy is None else 2 * tl.load(dy + at, at < N, other=0.0).to(tl.float32)
    tl.store(out + at, (factor * tl.abs(v)).to(out.dtype.element_ty), at < N)


def triton_forward(x, *, empty, dy=None):
    out = empty(x.shape, x.dtype)
    _signed_square_kernel[(triton.cdiv(x.numel(), 1024),)](x, dy, out, x.numel(), BLOCK=1024)
    return out


def triton_backward(dy, x, *, empty):
    return triton_forward(x, empty=empty, dy=dy)


signed_square = gl.op("signed_square", forward, backward, triton=(triton_forward, triton_backward))


@gl.register
class SignedSquare(gl.OpLayer):
    """y = x |x|; any shape."""

    op = signed_square


if __name__ == "__main__":
    x = np.random.default_rng(0).standard_normal((3, 40))
    print(gl.explain(signed_square, x))
    print(
        "right, in bounds, without races:", check_op(signed_square, x), check_op(signed_square, x[:, :7], numeric=True)
    )
    for report in audit_op(signed_square, Spec((4096, 4096), bfloat16), archs=[90]):
        print(f"{report.kernel} for sm_{report.arch}: {report.registers} registers, {report.loads}-bit loads")
    print(check_layer(SignedSquare(), (None, 7)).title)
    if has_gpu():
        bench_op(signed_square, (8192, 8192), torch=lambda x: x * x.abs(), rounds=3)
