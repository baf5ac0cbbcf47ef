"""What each Triton operation computes, on NumPy arrays: the builder under the interpreter.

Triton's own interpreter stores bfloat16 as bit patterns and computes on those; here every value has its true dtype
(bfloat16 and float8 through ml_dtypes, which rounds as a GPU does), and memory goes through `memory.Memory`.
A dot of float32 rounds its operands to TF32 unless the kernel asks for "ieee", because a GPU would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock

from gpulayers.testing import _integers, _libdevice
from gpulayers.testing._descriptor import Descriptor
from gpulayers.testing._values import INT1, INT32, SIZES, Handle, block_type, converter, factors, made, storage
from gpulayers.testing.memory import Memory


def _options() -> Any:
    """Stock interpreter options, with CUDA's dot precisions and without the overflow check (see _language.py)."""
    wanted = {
        "sanitize_overflow": False,
        "default_dot_input_precision": "tf32",
        "allowed_dot_input_precisions": ("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6"),
    }
    known = {f.name for f in fields(stock.InterpreterOptions)}
    return stock.InterpreterOptions(**{k: v for k, v in wanted.items() if k in known})


def _smallest_dot(lhs: Any, rhs: Any) -> tuple[int, int, int]:
    """The least M, N, K of a dot, as the NVIDIA backend has it."""
    return (1, 1, 32) if lhs.scalar.primitive_bitwidth == 8 else (1, 1, 16)


def _tf32(x: np.ndarray) -> np.ndarray:
    """float32 cut to TF32's 10 bits of mantissa, which is what the tensor cores read."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


class Builder(stock.InterpreterBuilder):
    """Evaluates each operation at once. `memory`, the grid and `fused` are set by the launch in progress."""

    memory: Memory
    fused = False
    """float32 as ptxas may compute it: a product goes unrounded into the sum or difference that takes it, and x / y is
    x times y's reciprocal (div.full)."""
    inline_asm: ClassVar[dict[str, Callable[..., Any]]] = {}  # assembly text -> function of its operands' arrays

    def __init__(self) -> None:
        super().__init__()
        self.options = _options()
        self.codegen_fns["min_dot_size"] = _smallest_dot

    # Constants.

    def get_null_value(self, ty: Any) -> Handle:
        return Handle(np.zeros(1, storage(ty)), ty.scalar)

    def get_all_ones_value(self, ty: Any) -> Handle:
        kind = storage(ty)
        return Handle(np.array([True]) if kind == np.bool_ else np.array([-1]).astype(kind), ty.scalar)

    def get_bf16(self, value: float) -> Handle:
        return Handle(np.array([value]).astype(ml_dtypes.bfloat16), tl.bfloat16)

    def create_get_program_id(self, axis: int) -> Handle:
        return Handle(np.array([self.grid_idx[axis]], np.int32), INT32)

    def create_make_range(self, ty: Any, start: int, stop: int) -> Handle:
        return Handle(np.arange(start, stop, dtype=np.int32), INT32)

    # Memory.

    def create_load(self, ptr: Handle, *_: Any) -> Handle:
        ty = ptr.get_element_ty()
        return Handle(self.memory.load(ptr.data, None, storage(ty), None), ty)

    def create_masked_load(self, ptr: Handle, mask: Handle, other: Handle | None, *_: Any) -> Handle:
        ty = ptr.get_element_ty()
        fill = None if other is None else other.data
        return Handle(self.memory.load(ptr.data, mask.data, storage(ty), fill), ty)

    def create_store(self, ptr: Handle, value: Handle, *_: Any) -> None:
        self.memory.store(ptr.data, value.data, None)

    def create_masked_store(self, ptr: Handle, value: Handle, mask: Handle, *_: Any) -> None:
        self.memory.store(ptr.data, value.data, mask.data)

    def create_barrier(self) -> None:
        self.memory.barrier()

    def create_atomic_rmw(self, op: Any, ptr: Handle, value: Handle, mask: Handle, sem: Any, scope: Any) -> Handle:
        self._refuse_soft_atomics(value)
        real = Handle(self.memory.atomic(ptr.data, mask.data, value.data.itemsize), ptr.dtype)
        return super().create_atomic_rmw(op, real, value, mask, sem, scope)

    def create_atomic_cas(self, ptr: Handle, compare: Handle, value: Handle, sem: Any, scope: Any) -> Handle:
        self._refuse_soft_atomics(value)
        real = Handle(self.memory.atomic(ptr.data, None, value.data.itemsize), ptr.dtype)
        return super().create_atomic_cas(real, compare, value, sem, scope)

    @staticmethod
    def _refuse_soft_atomics(value: Handle) -> None:
        if value.data.dtype.kind == "V" or value.dtype.name == "bf16":
            raise NotImplementedError("atomics on bfloat16 are not interpreted")

    def create_addptr(self, ptr: Handle, offset: Handle) -> Handle:
        return Handle(self.moved(ptr, offset), ptr.dtype)

    @staticmethod
    def moved(ptr: Handle, offset: Handle) -> np.ndarray:
        """Addresses so many elements further on."""
        size = SIZES.get(id(ptr.dtype.element_ty))
        if size is None:
            size = np.uint64(max(1, ptr.get_element_ty().primitive_bitwidth // 8))
        return ptr.data + offset.data.astype(np.int64, copy=False).view(np.uint64) * size

    def create_gather(self, src: Handle, indices: Handle, axis: int) -> Handle:
        size = src.data.shape[axis]
        if ((indices.data < 0) | (indices.data >= size)).any():
            came = f"{indices.data.min()} to {indices.data.max()}"
            raise IndexError(f"tl.gather: the rule is 0 ≤ index < {size} along axis {axis}; got {came}")
        return super().create_gather(src, indices, axis)

    # Tensor descriptors. Outside the tensor they read their padding, and write nothing.

    def create_make_tensor_descriptor(
        self, base: Handle, shape: Any, strides: Any, block: Any, signed: bool, padding: Any, *tf32: bool
    ) -> Descriptor:
        sizes, steps = ([int(n.data.item()) for n in numbers] for numbers in (shape, strides))
        return Descriptor(base, sizes, steps, [int(b) for b in block], padding, any(tf32))

    def create_descriptor_load(self, descriptor: Descriptor, indices: Sequence[Handle], *_: Any) -> Handle:
        ty = descriptor.base.get_element_ty()
        fill = np.asarray(np.nan if descriptor.padding == ir.PADDING_OPTION.PAD_NAN else 0).astype(storage(ty))
        where, inside = descriptor.addresses(indices)
        return Handle(self.memory.load(where, inside, storage(ty), fill), ty)

    def create_descriptor_store(self, descriptor: Descriptor, value: Handle, indices: Sequence[Handle]) -> None:
        where, inside = descriptor.addresses(indices)
        self.memory.store(where, value.data.reshape(where.shape), inside)

    def create_descriptor_gather(self, descriptor: Descriptor, rows: Handle, column: Handle, ty: Any) -> Handle:
        loads = [self.create_descriptor_load(descriptor, [Handle(np.array([row]), INT32), column]) for row in rows.data]
        return Handle(np.concatenate([load.data for load in loads]), loads[0].dtype)

    def create_descriptor_scatter(self, descriptor: Descriptor, value: Handle, rows: Handle, column: Handle) -> None:
        for row, data in zip(rows.data, value.data):
            index = [Handle(np.array([row]), INT32), column]
            self.create_descriptor_store(descriptor, Handle(data, value.dtype), index)

    # Casts.

    def cast_impl(self, src: Handle, ty: Any) -> Handle:
        return Handle(_cast(src.data, storage(ty)), ty.scalar)

    create_si_to_fp = create_ui_to_fp = create_fp_ext = create_fp_trunc = cast_impl

    def create_fp_to_si(self, src: Handle, ty: Any) -> Handle:
        return Handle(_integers.from_float(src.data, storage(ty)), ty.scalar)

    create_fp_to_ui = create_fp_to_si

    def create_int_cast(self, src: Handle, ty: Any, signed: bool) -> Handle:
        return Handle(src.data.astype(storage(ty)), ty.scalar)

    def create_fp_to_fp(self, src: Handle, ty: Any, rounding: Any) -> Handle:
        out = _cast(src.data, storage(ty))
        if rounding == ir.ROUNDING_MODE.RTZ:  # one step back towards zero where rounding went outwards
            wide = np.float64
            outward = np.abs(out.astype(wide)) > np.abs(src.data.astype(wide))
            bits = np.dtype(f"u{out.itemsize}")
            out = np.where(outward, out.view(bits) - bits.type(1), out.view(bits)).view(out.dtype)
        return Handle(out, ty.scalar)

    def create_bitcast(self, src: Handle, ty: Any) -> Handle:
        return Handle(np.ascontiguousarray(src.data).view(storage(ty)), ty.scalar)

    create_int_to_ptr = create_bitcast

    def create_ptr_to_int(self, src: Handle, ty: Any) -> Handle:
        self.memory.asked_where = True
        return self.create_bitcast(src, ty)

    # Arithmetic. Most of it is in the tables below the class.

    def binary_op(self, lhs: Handle, rhs: Handle, op: Callable[..., Any]) -> Handle:
        out = op(lhs.data, rhs.data)
        kind = lhs.data.dtype
        return Handle(out if out.dtype == kind else out.astype(kind), lhs.dtype.scalar)

    def unary_op(self, arg: Handle, op: Callable[..., Any]) -> Handle:
        return Handle(op(arg.data), arg.dtype.scalar)

    def create_fmul(self, lhs: Handle, rhs: Handle) -> Handle:
        out = self.binary_op(lhs, rhs, np.multiply)
        if self.fused and out.data.dtype == np.float32:
            out.set_attr("factors", (lhs.data, rhs.data))
        return out

    def create_fadd(self, lhs: Handle, rhs: Handle) -> Handle:
        return self._sum(lhs, rhs, np.add)

    def create_fsub(self, lhs: Handle, rhs: Handle) -> Handle:
        return self._sum(lhs, rhs, np.subtract)

    def _sum(self, lhs: Handle, rhs: Handle, op: Callable[..., Any]) -> Handle:
        first, second = factors(lhs), factors(rhs)
        if not self.fused or not (first or second):
            return self.binary_op(lhs, rhs, op)
        a, b = lhs.data.astype(np.float64), rhs.data.astype(np.float64)
        if second:  # of two products one stays unrounded
            b = np.multiply(*second, dtype=np.float64)
        elif first:
            a = np.multiply(*first, dtype=np.float64)
        return Handle(op(a, b).astype(np.float32), lhs.dtype.scalar)

    def create_fdiv(self, lhs: Handle, rhs: Handle) -> Handle:
        if not self.fused or rhs.data.dtype != np.float32:
            return self.binary_op(lhs, rhs, np.divide)
        one = np.float32(1)
        return lhs if (rhs.data == one).all() else self.binary_op(lhs, rhs, lambda a, b: a * (one / b))

    def create_ashr(self, lhs: Handle, rhs: Handle) -> Handle:
        return Handle(_integers.shift_right(lhs.data, rhs.data, signed=True), lhs.dtype.scalar)

    def create_lshr(self, lhs: Handle, rhs: Handle) -> Handle:
        return Handle(_integers.shift_right(lhs.data, rhs.data, signed=False), lhs.dtype.scalar)

    def create_select(self, condition: Handle, lhs: Handle, rhs: Handle) -> Handle:
        return Handle(np.where(condition.data, lhs.data, rhs.data), lhs.dtype.scalar)

    def create_clampf(self, arg: Handle, low: Handle, high: Handle, propagate: Any) -> Handle:
        if propagate == ir.PROPAGATE_NAN.NONE:
            out = np.fmin(np.fmax(arg.data, low.data), high.data)
        else:
            out = np.minimum(np.maximum(arg.data, low.data), high.data)
        return Handle(out, arg.dtype.scalar)

    def create_fma(self, x: Handle, y: Handle, z: Handle) -> Handle:
        wide = np.float64  # rounds once, up to float32
        out = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
        return Handle(out.astype(z.data.dtype), z.dtype.scalar)

    def create_fabs(self, arg: Handle) -> Handle:
        return Handle(np.abs(arg.data), arg.dtype.scalar)

    def create_rsqrt(self, arg: Handle) -> Handle:
        return Handle(arg.data.dtype.type(1) / np.sqrt(arg.data), arg.dtype.scalar)

    def create_erf(self, arg: Handle) -> Handle:
        return Handle(_libdevice.erf(arg.data), arg.dtype.scalar)

    def create_dot(self, a: Handle, b: Handle, acc: Handle, precision: Any, *_: Any) -> Handle:
        x, y, kind = a.data, b.data, acc.data.dtype
        if x.dtype.itemsize < 4:  # 16- and 8-bit products are exact in the accumulator's type
            wide = np.int32 if x.dtype.kind in "iu" else np.float32
            x, y = x.astype(wide), y.astype(wide)
        elif x.dtype == np.float32 and precision == ir.INPUT_PRECISION.TF32:
            x, y = _tf32(x), _tf32(y)
        return Handle((np.matmul(x, y) + acc.data).astype(kind, copy=False), acc.dtype.scalar)

    # Shapes.

    def create_splat(self, ty: Any, arg: Handle) -> Handle:
        return Handle(np.full(ty.shape, arg.data.reshape(-1)[0], arg.data.dtype), arg.dtype.scalar)

    def create_unsplat(self, arg: Handle) -> Handle:
        return Handle(arg.data.reshape(-1)[:1].copy(), arg.dtype.scalar)

    def create_broadcast(self, arg: Handle, shape: Any) -> Handle:
        return Handle(np.broadcast_to(arg.data, shape), arg.dtype.scalar)

    def create_expand_dims(self, arg: Handle, axis: int) -> Handle:
        index = (slice(None),) * axis + (None,)
        return Handle(arg.data[index], arg.dtype.scalar)

    # Code from outside Triton.

    def create_extern_elementwise(
        self, library: str, path: str, symbol: str, args: Sequence[Handle], ty: Any, pure: bool
    ) -> Handle:
        return Handle(_libdevice.call(symbol, *[a.data for a in args]).astype(storage(ty), copy=False), ty.scalar)

    def create_inline_asm(
        self, asm: str, constraints: str, args: Sequence[Handle], types: Any, pure: bool, pack: int
    ) -> _Results:
        function = self.inline_asm.get(" ".join(asm.split()))
        if function is None:
            raise NotImplementedError(f"no NumPy function is registered for the inline assembly {asm!r}")
        out = function(*[a.data for a in args])
        outs = out if isinstance(out, tuple) else (out,)
        return _Results(
            [Handle(np.asarray(o).astype(storage(ty), copy=False), ty.scalar) for o, ty in zip(outs, types)]
        )


class _Results:
    """The several results of one operation, as the semantic layer asks for them."""

    def __init__(self, results: list[Handle]):
        self.get_result = results.__getitem__


def _cast(data: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Convert with a GPU's rules: round to nearest even, float8 saturates instead of overflowing."""
    if kind.itemsize == 1 and kind.kind not in "biu":
        limit = float(ml_dtypes.finfo(kind).max)
        data = np.clip(data.astype(np.float32), -limit, limit)
    return data if data.dtype == kind else data.astype(kind)


def _binary(op: Callable[..., Any]) -> Callable[..., Handle]:
    return lambda self, lhs, rhs: self.binary_op(lhs, rhs, op)


def _compare(op: Callable[..., Any]) -> Callable[..., Handle]:
    return lambda self, lhs, rhs: Handle(op(lhs.data, rhs.data), INT1)


def _unary(op: Callable[..., Any]) -> Callable[..., Handle]:
    return lambda self, arg: Handle(op(arg.data), arg.dtype.scalar)


BINARY: dict[Callable[..., Any], str] = {
    np.multiply: "mul",
    np.divide: "precise_divf approx_divf",
    np.fmod: "frem",
    _integers.add: "add",
    _integers.subtract: "sub",
    _integers.divide: "sdiv udiv idiv",
    _integers.remainder: "srem urem",
    _integers.shift_left: "shl",
    _integers.multiply_high: "umulhi",
    np.minimum: "minsi minui minimumf",
    np.maximum: "maxsi maxui maximumf",
    np.fmin: "minnumf",
    np.fmax: "maxnumf",
    np.bitwise_and: "and",
    np.bitwise_or: "or",
    np.bitwise_xor: "xor",
}
COMPARE = {
    np.less: "icmpSLT icmpULT fcmpOLT fcmpULT",
    np.less_equal: "icmpSLE icmpULE fcmpOLE fcmpULE",
    np.greater: "icmpSGT icmpUGT fcmpOGT fcmpUGT",
    np.greater_equal: "icmpSGE icmpUGE fcmpOGE fcmpUGE",
    np.equal: "icmpEQ fcmpOEQ fcmpUEQ",
    np.not_equal: "icmpNE fcmpONE fcmpUNE",
}
UNARY = {
    np.negative: "fneg",
    np.sin: "sin",
    np.cos: "cos",
    np.exp: "exp",
    np.exp2: "exp2",
    np.log: "log",
    np.log2: "log2",
    np.sqrt: "sqrt precise_sqrt",
    np.floor: "floor",
    np.ceil: "ceil",
    np.abs: "iabs",
}
for table, make in ((BINARY, _binary), (COMPARE, _compare), (UNARY, _unary)):
    for function, names in table.items():
        for name in names.split():
            setattr(Builder, f"create_{name}", make(function))


class Semantic(TritonSemantic):
    """Triton's type rules over `Builder`."""

    def cast(self, input: Any, dst_ty: Any, fp_downcast_rounding: str | None = None) -> Any:
        """As Triton's, with a short way where a plain conversion is all there is to it."""
        source, target = input.dtype, dst_ty.scalar
        if source is target:
            return input
        if fp_downcast_rounding is None and (kind := converter(source, target)) is not None:
            data = input.handle.data.astype(kind)
            return made(data, target, block_type(target, data.shape) if input.type.is_block() else target)
        return super().cast(input, dst_ty, fp_downcast_rounding)

    def load(self, ptr: Any, mask: Any, other: Any, *rest: Any) -> Any:
        if other is not None and not ptr.type.is_block():
            other = _Given(self.cast(other, ptr.type.element_ty))
        return super().load(ptr, mask, other, *rest)

    def binary_op_type_checking_impl(self, lhs: Any, rhs: Any, *flags: Any, **named: Any) -> Any:
        """As Triton's, with a short way for operands whose type is the result's: most of them."""
        divides = (len(flags) > 3 and flags[3]) or named.get("div_or_mod", False)
        ty = getattr(lhs, "dtype", None)
        if (
            ty is not None
            and ty.is_ptr()
            and flags[:1] == (True,)
            and isinstance(rhs, tl.tensor)
            and rhs.dtype.is_int()
        ):
            return self.broadcast_impl_value(lhs, rhs)
        if ty is None or divides or ty.is_ptr():
            return super().binary_op_type_checking_impl(lhs, rhs, *flags, **named)
        if isinstance(rhs, tl.tensor):
            if rhs.dtype is ty:
                return self.broadcast_impl_value(lhs, rhs)
        elif type(rhs) is float and ty.is_floating():
            wide = np.full(lhs.handle.data.shape, rhs or 0.0, storage(ty))  # Triton knows one zero
            return lhs, tl.tensor(Handle(wide, ty), lhs.type)
        elif type(rhs) is int and ty is INT32 and -(2**31) <= rhs < 2**31:
            return lhs, tl.tensor(Handle(np.full(lhs.handle.data.shape, rhs, np.int32), ty), lhs.type)
        return super().binary_op_type_checking_impl(lhs, rhs, *flags, **named)

    def broadcast_impl_value(self, lhs: Any, rhs: Any) -> Any:
        """As Triton's, which spends most of an operation here on equal shapes."""
        if not rhs.type.is_block():
            return lhs, _spread(rhs, lhs.handle.data.shape) if lhs.type.is_block() else rhs
        b = rhs.handle.data.shape
        if not lhs.type.is_block():
            return _spread(lhs, b), rhs
        a = lhs.handle.data.shape
        if a == b:
            return lhs, rhs
        shape = tuple(n if m == 1 else m for m, n in zip((1,) * (len(b) - len(a)) + a, (1,) * (len(a) - len(b)) + b))
        if any(m not in (1, n) for s in (a, b) for m, n in zip(s[::-1], shape[::-1])):
            return super().broadcast_impl_value(lhs, rhs)  # raises
        return lhs if a == shape else _spread(lhs, shape), rhs if b == shape else _spread(rhs, shape)


def _spread(value: Any, shape: tuple[int, ...]) -> Any:
    """A tensor broadcast to a block."""
    data, scalar = value.handle.data, value.type.scalar
    wide = np.full(shape, data[0], data.dtype) if data.size == 1 else np.broadcast_to(data, shape)
    return tl.tensor(Handle(wide, scalar), block_type(scalar, shape))


class _Given(tl.tensor):
    """A scalar that counts as given although its value is 0: Triton's load asks `if other`."""

    def __init__(self, value: Any):
        super().__init__(value.handle, value.type)

    def __bool__(self) -> bool:
        return True


BUILDER = Builder()
SEMANTIC = Semantic(BUILDER)
