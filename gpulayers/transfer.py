"""Carrying arrays across: zero-copy views between NumPy, CuPy and torch, copies between devices, and the bridge over
which the arrays of a planned call reach the functions that compute it, and come back.

CuPy and torch are touched only when one of their arrays comes in.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpulayers import arrays
from gpulayers.arrays import CUPY, NUMPY, TORCH, Library, Spec, bfloat16, from_torch_dtype, guests, library, namespace
from gpulayers.definition import Definition

# --- zero-copy views -------------------------------------------------------------------------------------------------


class _Capsule:
    """Lends a CPU tensor to NumPy, read-only. ``Tensor.numpy()`` would make the storage unresizable for ever."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Any):
        self.tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        import torch

        return torch._C._to_dlpack(self.tensor)  # the public function refuses what requires a gradient

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class _Memory:
    """Lends memory to NumPy, writeable: a CPU tensor's that an op updates, a read-only array's that torch shall see."""

    def __init__(self, owner: Any, pointer: int, kind: np.dtype, strides: Sequence[int]):
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(owner.shape),
            "typestr": kind.str,
            "data": (pointer, False),
            "strides": tuple(strides),
        }


def torch_to_numpy(x: Any, writeable: bool = False) -> np.ndarray:
    """A view of a CPU tensor; read-only unless asked otherwise. bfloat16 comes as ml_dtypes' bfloat16."""
    import torch

    half = x.dtype is torch.bfloat16
    if half:
        x = x.detach().view(torch.uint16)
    if writeable and x.numel():
        kind = from_torch_dtype(x.dtype)
        view = np.asarray(_Memory(x, x.data_ptr(), kind, [s * kind.itemsize for s in x.stride()]))
    else:
        view = np.from_dlpack(_Capsule(x))
    return view.view(bfloat16) if half else view


def numpy_to_torch(x: Any) -> Any:
    """A CPU tensor over the same memory; a copy where the memory is read-only (it may be an input's)."""
    x = np.asarray(x)
    return _tensor_over(x if x.flags.writeable and all(s >= 0 for s in x.strides) else x.copy())


def lend_to_torch(x: Any) -> Any:
    """A CPU tensor over the same memory, read-only or not: for functions that do not write to it."""
    x = np.asarray(x)
    if x.flags.writeable or any(s < 0 for s in x.strides) or not x.size:
        return numpy_to_torch(x)
    kind = np.dtype(np.uint16) if x.dtype == bfloat16 else x.dtype
    return _tensor_over(np.asarray(_Memory(x, x.ctypes.data, kind, x.strides)).view(x.dtype))


def _tensor_over(x: np.ndarray) -> Any:
    import torch

    if x.dtype == bfloat16:
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def cupy_to_torch(x: Any) -> Any:
    import torch

    if x.dtype == bfloat16:
        return torch.from_dlpack(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_dlpack(x)


def torch_to_cupy(x: Any) -> Any:
    import cupy
    import torch

    x = x.detach()
    if x.dtype is torch.bfloat16:
        return cupy.from_dlpack(x.view(torch.uint16)).view(bfloat16)
    return cupy.from_dlpack(x)


_VIEWS: dict[tuple[str, str], Callable] = {
    ("torch", "numpy"): torch_to_numpy,
    ("numpy", "torch"): numpy_to_torch,
    ("cupy", "torch"): cupy_to_torch,
    ("torch", "cupy"): torch_to_cupy,
}


def view(x: Any, source: str, target: str, writeable: bool = False) -> Any:
    """``x`` (an array, None, or a list of them) of library ``source`` as an array of library ``target``, zero-copy."""
    if x is None or source == target:
        return x
    if isinstance(x, list | tuple):
        return [view(a, source, target, writeable) for a in x]
    if writeable and (source, target) == ("torch", "numpy"):
        return torch_to_numpy(x, writeable=True)
    return _VIEWS[source, target](x)


def to_numpy(x: Any) -> np.ndarray:
    """A NumPy array with the values of ``x``; copies only if ``x`` is on a GPU."""
    lib = library(x)
    if lib is NUMPY:
        return np.asarray(x)
    if lib is CUPY:
        return x.get()
    return torch_to_numpy(x.detach().cpu())


def to_device(x: Any, device: str) -> Any:
    """``x`` as an array on "cpu" (NumPy) or "cuda[:i]" (CuPy if it is installed, else torch)."""
    if device == "cpu":
        return to_numpy(x)
    if not device.startswith("cuda"):
        raise ValueError(f'device must be "cpu" or "cuda[:index]", got {device!r}')
    if library(x) is not NUMPY and library(x).device(x).startswith(device):
        return x
    host = to_numpy(x)
    return device_library().copy_in(host, device)


class _Device(NamedTuple):
    """The array library that native layers use on a GPU."""

    name: str
    copy_in: Callable[[np.ndarray, str], Any]


@functools.cache
def device_library() -> _Device:
    """CuPy (array code written for NumPy runs on it), else torch. Raises RuntimeError without either."""
    with contextlib.suppress(ImportError):
        import cupy

        if cupy.cuda.is_available():

            def copy_in(host: np.ndarray, device: str) -> Any:
                with CUPY.on(f"cuda:{device.partition(':')[2] or 0}"):
                    return cupy.asarray(host)

            return _Device("cupy", copy_in)
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            return _Device("torch", lambda host, device: numpy_to_torch(host.copy()).to(device))
    raise RuntimeError("no GPU: neither CuPy nor torch finds a CUDA device here")


def beside(host: np.ndarray, x: Any) -> Any:
    """A small NumPy array as one of x's library, on its device; nothing waits for the GPU."""
    lib = library(x)
    if lib is NUMPY:
        return host
    if lib is TORCH:
        return numpy_to_torch(host.copy()).to(x.device, non_blocking=True)
    with lib.on(lib.device(x)):
        return namespace(x).asarray(host)


# --- the arrays of a call --------------------------------------------------------------------------------------------


HOME = {"triton": "torch", "cuda": "cupy", "aten": "torch", "numpy": "numpy"}
"""Whose arrays a backend's launchers take."""


class Bridge:
    """How arrays cross from the caller's library to the one that a backend's functions take, and back."""

    def __init__(self, home: Library, backend: str, device: str):
        self.home, self.device = home, device
        self.target = HOME.get(backend) or ("numpy" if device == "cpu" else "cupy")
        if backend == "cuda" and device == "cpu":
            self.target = "numpy"  # emulated
        native = backend in ("definition", "aten", "numpy")
        self.extra = {} if native else {"empty": _allocator(home, self.target, device)}
        self._torchs = (home.name, self.target) == ("torch", "numpy")
        self._lent = (home.name, self.target) == ("numpy", "torch")
        self.open = home.name == self.target and home.is_only(device)
        """Arrays are the backend's own already, and no device has to be made current."""

    def around_forward(self, forward: Callable, op: Definition, outputs: tuple[str, ...]) -> Callable:
        """``forward`` for the caller's arrays; an input or an output that it saves stays the caller's own array."""

        def run(*inputs: Any, **values: Any) -> tuple[tuple, dict]:
            with self.entered():
                found, saved = forward(*[self.inward(x, n in op.updates) for x, n in zip(inputs, op.inputs)], **values)
                found = tuple([self.outward(y) for y in found])
                if not saved:
                    return found, saved
                own = dict(zip(op.inputs, inputs)) | dict(zip(outputs, found))
                return found, {k: own[k] if k in own else self.outward(a) for k, a in saved.items()}

        return run

    def around_backward(self, backward: Callable) -> Callable:
        """``backward`` for the caller's arrays."""

        def run(dys: Sequence[Any], saved: dict[str, Any], **options: Any) -> tuple:
            with self.entered():
                given = tuple([self.inward(dy) for dy in dys])
                kept = {k: self.inward(a) for k, a in saved.items()}
                grads = backward(given, kept, **options)
                own = {id(g): self.outward(g) for g in grads}  # one array for two inputs stays one
                return tuple([own[id(g)] for g in grads])

        return run

    def entered(self) -> contextlib.AbstractContextManager:
        """The device and the caller's stream are the current ones inside."""
        if self.device == "cpu":
            # Neither warns of NaN and Inf: torch does not.
            return _Guest() if self._torchs else np.errstate(all="ignore")
        if self.home.name == self.target and self.home.is_current(self.device):
            return _NOTHING
        stack = contextlib.ExitStack()
        stack.enter_context(self.home.on(self.device))
        stack.enter_context(_same_stream(self.home.name, self.target, self.device))
        return stack

    def inward(self, x: Any, writeable: bool = False) -> Any:
        """An array, None or a list of them as the backend's own; read-only unless the op updates it."""
        if self._lent:
            return [*map(self.inward, x)] if isinstance(x, list | tuple) else x if x is None else lend_to_torch(x)
        return view(x, self.home.name, self.target, writeable)

    def outward(self, x: Any) -> Any:
        """A result as the caller's own."""
        return view(x, self.target, self.home.name)


_NOTHING = contextlib.nullcontext()
_BY_NUMPY = 1 << 16
"""Multiplications in a product that NumPy has done before torch has begun; its BLAS does so few in one thread."""


class _Guest(np.errstate):
    """NumPy computes on torch's tensors: without its warnings, which torch has not, and with torch's products."""

    def __init__(self) -> None:
        super().__init__(all="ignore")

    def __enter__(self) -> None:
        super().__enter__()
        self.before = guests.matmul, guests.cores
        guests.matmul, guests.cores = _torchs_matmul, 1  # type: ignore[method-assign]

    def __exit__(self, *error: Any) -> None:
        guests.matmul, guests.cores = self.before  # type: ignore[method-assign]
        super().__exit__(*error)


def _torchs_matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """np.matmul by torch, on the same memory."""
    import torch

    if min(a.ndim, b.ndim) < 2 or a.size * b.shape[-1] < _BY_NUMPY:
        return np.matmul(a, b, out=out)
    given = lend_to_torch(a), lend_to_torch(b)
    into = None if out is None else _tensor_over(out)
    with torch._C._ExcludeDispatchKeyGuard(_autocast()):
        found = torch.matmul(*given, out=into)
    return found.numpy() if out is None else out


@functools.cache
def _autocast() -> Any:
    """What would round products to 16 bits."""
    import torch

    return torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


_poison = False


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill the memory that launchers are handed with NaN (101 for integers), so that an unwritten element shows."""
    global _poison
    before, _poison = _poison, True
    try:
        yield
    finally:
        _poison = before


def _allocator(home: Library, target: str, device: str) -> Callable:
    def empty(shape: Sequence[int], dtype: Any, order: tuple[int, ...] | None = None) -> Any:
        """An uninitialised array of the caller's library, viewed as the backend's."""
        spec = Spec(tuple(shape), arrays.dtype(dtype), order)
        fresh = view(home.empty(spec, device), home.name, target, writeable=True)
        if _poison:
            # Not by assignment: to a 0-dim tensor that is a copy from the host, which no CUDA graph takes.
            fill = fresh.fill_ if target == "torch" else fresh.fill
            fill(float("nan") if arrays.library(fresh).dtype(fresh) in arrays.FLOATS else 101)
        return fresh

    return empty


def _same_stream(home: str, target: str, device: str) -> contextlib.AbstractContextManager:
    """Makes the caller's current stream the backend's library's current stream, too."""
    if device == "cpu" or home == target:
        return contextlib.nullcontext()
    import cupy
    import torch

    if target == "torch":
        pointer = cupy.cuda.get_current_stream().ptr
        if pointer in (0, 1):  # the default stream, which torch would take for "any stream of mine"
            return torch.cuda.stream(torch.cuda.default_stream(device))
        return torch.cuda.stream(torch.cuda.ExternalStream(pointer, device=device))
    return cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream)
