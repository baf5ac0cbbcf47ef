"""Recording: a launcher runs as ever, and what it asks of the driver is written down as the parts of a tape."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from inspect import Parameter
from typing import Any

import numpy as np

from gpulayers import arrays
from gpulayers.arrays import Spec
from gpulayers.launch import _tape
from gpulayers.launch._place import Place
from gpulayers.launch._watch import watching

UNTAPED = {
    "torch": "it calls {}",
    "shared": "arrays that share memory, and a kernel is given a part of one",
    "foreign": "a kernel is given memory that was neither an input nor allocated by empty",
    "view": "it returns a part of an array",
    "scratch": "a kernel needs scratch memory",
    "attributes": "a kernel is launched in clusters or cooperatively",
    "descriptor": "a tensor descriptor that is no CUtensorMap",
    "kind": "a kernel's argument of type {}",
    "driver": "the driver cannot move a tensor map (cuTensorMapReplaceAddress, since CUDA 12.0)",
    "unaligned": "memory was allocated at an address that 16 does not divide",
    "own_cuda": "CUDA kernels of one's own: CuPy's operations between their launches would be lost",
    "large": "its arguments are more than a thread's stack should hold",
    "differs": "it did something else when it was called again",
    "off": "GPULAYERS_TAPE=0, or taping is off",
}
"""Why a call is not taped; {} is what came. Besides, what never comes to a tape: gradients of gradients, torch.func,
forward-mode differentiation, dispatch modes, tracing and compilers; calls while a profiler's hooks are in Triton."""


class Untapeable(RuntimeError):
    """A launcher does something that no tape holds; the text says what."""

    def __init__(self, reason: str, came: Any = ""):
        super().__init__(UNTAPED[reason].format(came) if reason else came)


_SCALARS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I"}
_FLOATS = {"fp32": _tape.FLOAT, "f32": _tape.FLOAT, "fp64": _tape.DOUBLE}
_SCALARS |= {"u64": "Q", "fp32": "f", "f32": "f", "fp64": "d"}
_MOST_BYTES, _MOST_ARRAYS = 1 << 18, 1 << 14
"""Of arguments, and arrays, that a replay keeps on its stack."""
_NOWHERE = 1 << 20
"""The address in a tensor map that waits for its own."""


class Recorder:
    """Notes what one launcher does in this thread."""

    def __init__(self, place: Place, varying: Sequence[str] = ()):
        """varying: the kernels' parameters that come with each call."""
        self.place, self.varying = place, tuple(varying)
        self.why: str | None = None
        """The first reason why no tape comes of it; the launcher runs on, as ever."""
        self.inputs: list[Any] = []
        self.made: list[Any] = []
        self.spans: list[tuple[int, int]] = []
        """Where inputs and allocations begin and end: most are nowhere near a given array."""
        self.allocations: list[tuple] = []
        self.block, self.params = bytearray(), list[int]()
        self.launches: list[bytes] = []
        self.patches: list[bytes] = []
        self.kept: list[Any] = []
        self.asked: dict[Any, tuple] = {}
        self.lasting: list[Any] = []
        self.quiet: list[list] = []
        self.same: list[Any] = []
        self.allocating = False

    # --- the launcher's world ----------------------------------------------------------------------------------------

    def run(self, given: Sequence[Any], call: Callable[[Callable], Any], empty: Callable) -> Any:
        """What ``call(empty)`` gives, noted. given: the arrays that a repeat will bring, in the launcher's library."""
        self.inputs = list(given)
        with watching(self):
            return call(functools.partial(self._empty, empty))

    def ask(self, about: Any, question: Callable[[], Any], answer: Any) -> None:
        """The launcher asked something that is no metadata, and was answered so."""
        self.asked[about] = question, answer

    def told(self, what: str, *args: Any) -> None:
        """The launcher did something: "called", "triton" or "cuda"."""
        if self.why is None:
            try:
                getattr(self, what)(*args)
            except Untapeable as why:
                self.why = str(why)

    def _empty(self, empty: Callable, shape: Sequence[int], dtype: Any, order: tuple[int, ...] | None = None) -> Any:
        self.allocating = True
        try:
            fresh = empty(shape, dtype, order)
        finally:
            self.allocating = False
        self.made.append(fresh)
        self.allocations.append(self.place.allocation(Spec(tuple(shape), arrays.dtype(dtype), order)))
        return fresh

    def called(self, function: Any) -> None:
        """torch ran an operation; views are free."""
        if self.allocating:
            return
        returns = function._schema.returns
        alias = returns[0].alias_info if returns else None
        if alias is None or alias.is_write:
            raise Untapeable("torch", function)

    # --- whose memory ------------------------------------------------------------------------------------------------

    def slot(self, x: Any) -> tuple[int, int] | None:
        """(slot, bytes from its first element) of an array that is an input, an allocation, or a part of one."""
        known = [*self.inputs, *self.made]
        same = [i for i, a in enumerate(known) if a is x]
        if same:
            if len(same) > 1:
                raise Untapeable("shared")
            return same[0], 0
        address = _address(x)
        self.spans += map(_span, known[len(self.spans) :])
        near = [i for i, (low, high) in enumerate(self.spans) if low <= address < high]
        found = [(i, address - _address(known[i])) for i in near if _contains(known[i], address)]
        if len(found) > 1:
            raise Untapeable("shared")
        if not found and (address or _size(x)):
            raise Untapeable("foreign")
        return found[0] if found else None

    def _is_lasting(self, x: Any) -> bool:
        return any(x is kept for kept in self.lasting)

    def returned(self, ys: Sequence[Any]) -> tuple[int | None, ...]:
        known = [*self.inputs, *self.made]

        def of(y: Any) -> int | None:
            if y is None:
                return None
            for same in (lambda a: a is y, lambda a: a is not None and _metadata(a) == _metadata(y)):
                for i in reversed(range(len(known))):  # what was allocated comes before an input it may stand for
                    if same(known[i]):
                        return i
            raise Untapeable("view")

        return tuple(map(of, ys))

    # --- launches ----------------------------------------------------------------------------------------------------

    def _add(self, data: bytes, align: int) -> int:
        self.block += bytes(-len(self.block) % align)
        self.params.append(len(self.block))
        self.block += data
        return self.params[-1]

    def _pointer(self, x: Any) -> None:
        if x is not None and self._is_lasting(x):
            self._add(_address(x).to_bytes(8, "little"), 8)
            self.kept.append(x)
            return
        at, slot = self._add(bytes(8), 8), None if x is None else self.slot(x)
        if slot is not None:
            self.patches.append(_tape.PATCH.pack(slot[1], at, slot[0], _tape.POINTER, 0))

    def _launch(self, function: int, grid: Sequence[int], block: Sequence[int], shared: int, first: int) -> None:
        self.launches.append(_tape.LAUNCH.pack(function, *(*grid, 1, 1)[:3], *(*block, 1, 1)[:3], shared, first))

    def triton(self, kernel: Any, compiled: Any, grid: Any, args: tuple, options: dict[str, Any]) -> None:
        """Triton launched a kernel with these arguments."""
        meta, first = compiled.metadata, len(self.params)
        if meta.global_scratch_size or meta.profile_scratch_size:
            raise Untapeable("scratch")
        if meta.num_ctas != 1 or meta.launch_cooperative_grid or meta.launch_pdl:
            raise Untapeable("attributes")
        self.kept.append(compiled)
        self.quiet.append(kernel.pre_run_hooks)
        for (name, _), (_, names_there) in getattr(kernel, "used_global_vals", {}).items():
            if not kernel.fn.__module__.startswith("gpulayers.kernels."):  # there they are constants
                self.same += names_there, name, names_there.get(name)  # Triton raises where one has changed
        given = bound(kernel, args, options)
        maps = iter(getattr(meta, "tensordesc_meta", None) or ())
        for name, kind in compiled.src.signature.items():
            if name in self.varying and kind in _FLOATS:
                at = self._add(bytes(8), 8)
                self.patches.append(_tape.PATCH.pack(0, at, self.varying.index(name), _FLOATS[kind], 0))
            else:
                self._argument(given[name], kind, maps)
        self._add(bytes(8), 8), self._add(bytes(8), 8)  # Triton's two pointers to scratch memory
        sizes = grid(given) if callable(grid) else grid
        self._launch(compiled.function, sizes, (32 * meta.num_warps,), meta.shared, first)

    def _argument(self, value: Any, kind: Any, maps: Iterator[Any]) -> None:
        """A parameter as the compiled kernel takes it; kind: its type in Triton's words."""
        if isinstance(kind, tuple):
            for v, k in zip(value, kind):
                self._argument(v, k, maps)
        elif kind == "constexpr":
            return
        elif kind[0] == "*":
            self._pointer(value)
        elif kind.startswith("tensordesc"):
            self._map(value, next(maps, None))
        elif kind in _SCALARS:
            self._number(value, kind)
        else:
            raise Untapeable("kind", kind)

    def _number(self, value: Any, kind: str) -> None:
        if kind == "i64" and value in self._addresses:  # by value, for a table of addresses
            self._pointer(self._addresses[value])
        else:
            self._add(struct.pack(_SCALARS[kind], value), 8)

    @functools.cached_property
    def _addresses(self) -> dict[int, Any]:
        """The inputs by their addresses."""
        return {_address(x): x for x in self.inputs if x is not None and _size(x)}

    def _map(self, value: Any, meta: Any) -> None:
        """A tensor map, and the sizes and steps that Triton passes after it."""
        from triton.backends.nvidia import driver as nv

        if meta is None:
            raise Untapeable("descriptor")
        make = nv.make_tensordesc_arg  # Triton 3.8 gave it a third parameter, which it does not use here
        made, *numbers = make(value, meta, *[None] * (make.__code__.co_argcount - 2))
        raw = ctypes.create_string_buffer(ctypes.string_at(id(made) + type(made).__basicsize__ - 128, 128), 128)
        slot = self.slot(value.base)
        if slot is None or getattr(_tape.driver(), "cuTensorMapReplaceAddress", None) is None:
            raise Untapeable("driver")
        aligned = ctypes.create_string_buffer(192)
        at = ctypes.addressof(aligned) + 63 & ~63
        ctypes.memmove(at, raw, 128)
        _tape.driver().cuTensorMapReplaceAddress(at, _NOWHERE)
        place = self._add(ctypes.string_at(at, 128), 64)
        self.patches.append(_tape.PATCH.pack(slot[1], place, slot[0], _tape.MAP, 0))
        for i, number in enumerate(numbers):
            self._add(struct.pack("i" if i < len(numbers) // 2 else "q", number), 8)

    def cuda(
        self,
        kernel: Any,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        shared: int,
        cooperative: bool = False,
    ) -> None:
        """CuPy launched a kernel with these arguments."""
        first = len(self.params)
        for arg in args:
            if isinstance(arg, np.generic):
                self._add(arg.tobytes(), arg.itemsize)
            else:
                self._pointer(arg)
        self.kept.append(kernel)
        self._launch(kernel.kernel.ptr, grid, block, shared | _tape.COOPERATIVE * cooperative, first)

    # --- the tape ----------------------------------------------------------------------------------------------------

    def parts(self, ys: Sequence[Any], same: tuple) -> _tape.Parts:
        """All that was noted; ys: what the launcher gave, same: what must stay as it is. Raises Untapeable."""
        if self.why is not None:
            raise Untapeable("", self.why)
        known = [*self.inputs, *self.made]
        modulo = bytes(0 if x is None else _address(x) & 15 for x in known)
        if any(modulo[len(self.inputs) :]):
            raise Untapeable("unaligned")
        if len(self.block) > _MOST_BYTES or len(known) > _MOST_ARRAYS:
            raise Untapeable("large")
        numbers, asked = len(self.varying), tuple(part for pair in self.asked.values() for part in pair)
        quiet = {id(calls): calls for calls in (*self.quiet, *hooks_of_triton())}.values()
        return _tape.Parts(
            self.place.address, self.place.stream, self.place.ordinal, tuple(self.allocations), self.returned(ys),
            tuple(self.kept), (*same, *self.same), asked, tuple(quiet), numbers, bytes(self.block),
            b"".join(map(_tape.OFFSET.pack, self.params)), b"".join(self.launches), b"".join(self.patches), modulo,
        )  # fmt: skip


def hooks_of_triton() -> Iterator[list]:
    """The lists of hooks that Triton calls at each launch."""
    try:
        from triton import knobs
    except ImportError:
        return
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        if hook is not None:
            yield hook.calls


def bound(kernel: Any, args: Sequence[Any], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a launch by name, and defaults: what inspect binds, which takes ten times as long."""
    names = kernel.arg_names
    found, left = dict(zip(names, args)), names[len(args) :]
    defaults = {n: kernel.signature.parameters[n].default for n in left if n not in options}
    if (
        len(args) > len(names)
        or any(d is Parameter.empty for d in defaults.values())
        or not options.keys().isdisjoint(found)
    ):
        kernel.signature.bind(*args, **{k: v for k, v in options.items() if k in names})  # raises
    return found | {n: options[n] for n in left if n in options} | defaults


def _address(x: Any) -> int:
    if x is None:
        return 0
    if isinstance(x, np.ndarray):
        return x.ctypes.data
    return x.data_ptr() if hasattr(x, "data_ptr") else x.data.ptr


def _size(x: Any) -> int:
    return x.numel() if hasattr(x, "numel") else x.size


def _steps(x: Any) -> tuple[tuple[int, ...], int]:
    """(strides, bytes of an element)."""
    if hasattr(x, "data_ptr"):
        return x.stride(), x.element_size()
    return tuple(s // x.itemsize for s in x.strides), x.itemsize


def _metadata(x: Any) -> tuple:
    return _address(x), tuple(x.shape), *_steps(x), str(x.dtype)


def _span(x: Any) -> tuple[int, int]:
    """The addresses of its first byte and of the one behind its last."""
    if x is None:
        return 0, 0
    steps, itemsize = _steps(x)
    low, size = arrays.span(_address(x), x.shape, [s * itemsize for s in steps], itemsize)
    return low, low + size


def _contains(x: Any, address: int) -> bool:
    """Whether an element of ``x`` lies at an address."""
    strides, itemsize = _steps(x)
    left, rest = divmod(address - _address(x), itemsize)
    if rest or 0 in x.shape:
        return False
    for n, step in sorted(zip(x.shape, strides), key=lambda axis: -abs(axis[1])):
        if step:
            taken = min(max(left // step, 0), n - 1)
            left -= taken * step
    return left == 0
