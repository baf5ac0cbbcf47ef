"""What compiled code launches, without a GPU: CPU tensors are served by Triton's kernels, and each launch that stands in
Inductor's code is interpreted, from the source and with the arguments that stand there."""

import contextlib
import functools
from unittest import mock

import torch
import triton
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor import graph
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch_calls import PLAIN_CPP
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from gpulayers.testing.interpreter import interpreting
from gpulayers.testing.null_driver import null_driver

LITE = {"fallback_by_default": True, "fallback_random": True, **PLAIN_CPP}
"""torch's own operations are called; the few that are compiled to C++ all the same are so without what takes longest."""
_falls_back = graph.should_fallback_by_default
_accesses = triton_kernel_wrap.identify_accessed_tensors


def _is_called(node):
    """Whether an operation of torch is called; views and allocations are Inductor's own."""
    schema = getattr(node.target, "_schema", None)
    is_view = schema is not None and any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
    return _falls_back(node) and not is_view and node.target is not torch.ops.aten.empty.memory_format


class Kernel:
    """A kernel of generated code, called as that code calls it."""

    def __init__(self, tuned):
        self.function, self.meta, self.config = tuned.fn, tuned.triton_meta, tuned.configs[0]
        self.constants = self.meta["constants"]

    def run(self, *args, stream):
        *args, x, y, z = args
        names = [p.name for p in self.function.params if not p.is_constexpr]
        given = dict(zip(names, args, strict=True)) | self.constants
        self.function[x, y, z](**given, num_warps=self.config.num_warps, num_stages=self.config.num_stages)


def ttir(function, signature, constants, attributes=None):
    """A kernel as Triton's compiler reads it."""
    target = GPUTarget("cuda", 90, 32)
    context, backend = triton._C.libtriton.ir.context(), make_backend(target)
    triton._C.libtriton.ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options({})
    source = ASTSource(function, signature, constants, attributes)
    built = backend.get_codegen_implementation(options), backend.get_module_map()
    return str(source.make_ir(target, options, *built, context))


_found = {}


@functools.wraps(_accesses)
def _known_accesses(kernel, kwargs, descriptors):
    """torch's analysis of what a kernel writes, which it makes anew for each launch; no size has a part in that."""
    function = kernel if isinstance(kernel, JITFunction) else kernel.fn
    constants = {p.name for p in function.params if p.is_constexpr}

    def kind(name, value):
        if hasattr(value, "get_dtype"):
            return str(value.get_dtype())
        if hasattr(value, "dtype"):
            return str(value.dtype)
        return repr(value) if name in constants or value is None else "number"

    key = function.src, str(sorted((k, kind(k, v)) for k, v in kwargs.items())), repr(descriptors)
    if key not in _found:
        _found[key] = _accesses(kernel, kwargs, descriptors)
    return _found[key]


@contextlib.contextmanager
def launched():
    """(the session of the interpreter, whose ``launches`` tell what ran; the kernels of generated code)."""
    kernels = []

    def load(self, name, source, device_str="cuda"):
        kernels.append(Kernel(getattr(PyCodeCache.load(source), name)))
        return kernels[-1]

    replaced = [
        (AsyncCompile, "triton", load),
        (graph, "should_fallback_by_default", _is_called),
        # A number on the CPU is handed over as such, which one on a GPU is not.
        (graph.GraphLowering, "is_unspec_arg", lambda self, name: False),
        (torch.utils._triton, "has_triton_tensor_descriptor_host_tma", lambda: True),
        (triton_kernel_wrap, "identify_accessed_tensors", _known_accesses),
    ]
    torch.compiler.reset()
    with contextlib.ExitStack() as stack:
        stack.enter_context(null_driver(compiled=False))
        stack.enter_context(torch._inductor.config.patch(force_disable_caches=True))
        for place in replaced:
            stack.enter_context(mock.patch.object(*place))
        yield stack.enter_context(interpreting()), kernels
