"""Who can compute a case, by name: ours by backend, torch, torch.compile, and what the case itself names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from gpulayers.bench.cases.case import DIRECTIONS, Case, Other, installed
from torch import Tensor

from gpulayers import dispatch

Backward = Callable[[Sequence[Tensor], bool], list[Tensor]]
"""backward(dys, keep): one gradient for each wanted input; keep: it will be called again."""


class Function:
    """One provider's way to compute one case."""

    directions: tuple[str, ...] = DIRECTIONS
    in_place = False
    no_graph = ""
    """Why no CUDA graph can hold its calls."""

    def __init__(self, case: Case):
        self.case, self.needs = case, case.wanted()

    def put(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs as this provider wants them in memory; not timed."""
        return list(inputs)

    def entered(self) -> contextlib.AbstractContextManager:
        """Around all calls."""
        return contextlib.nullcontext()

    def forward(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """The outputs, where no gradient will be wanted."""
        raise NotImplementedError

    def record(self, inputs: Sequence[Any]) -> tuple[tuple[Tensor, ...], Backward]:
        """(outputs, what computes the gradients)."""
        raise NotImplementedError

    def both(self, inputs: Sequence[Any], dys: Sequence[Tensor]) -> tuple[Any, Any]:
        outputs, backward = self.record(inputs)
        return outputs, backward(dys, False)


class Ours(Function):
    """The op, on one backend alone."""

    def __init__(self, case: Case, backend: str):
        super().__init__(case)
        self.backend = backend

    def entered(self) -> contextlib.AbstractContextManager:
        return dispatch.only(self.backend)

    def forward(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        return _tuple(self.case.op(*inputs, **self.case.options))

    def record(self, inputs: Sequence[Any]) -> tuple[tuple[Tensor, ...], Backward]:
        y, call = self.case.op.record(*inputs, needs=self.needs, **self.case.options)

        def backward(dys: Sequence[Tensor], keep: bool) -> list[Tensor]:
            return [g for g in call.backward(*dys) if g is not None]

        return _tuple(y), backward


class Theirs(Function):
    """A function of tensors, differentiated by torch."""

    def __init__(self, case: Case, other: Other):
        super().__init__(case)
        self.other, self.directions, self.in_place = other, other.directions, other.in_place
        self.no_graph = "it writes to its inputs" if other.in_place else ""

    def put(self, inputs: Sequence[Any]) -> list[Any]:
        move = self.other.put
        return list(inputs) if move is None else [x if x is None else move(x) for x in inputs]

    def entered(self) -> contextlib.AbstractContextManager:
        return self.other.context()

    def forward(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        return _tuple(self.other.call(*inputs))

    def record(self, inputs: Sequence[Any]) -> tuple[tuple[Tensor, ...], Backward]:
        leaves = [x.detach().requires_grad_() if n in self.needs else x for n, x in zip(self.case.op.inputs, inputs)]
        y = _tuple(self.other.call(*leaves))
        wanted = [x for n, x in zip(self.case.op.inputs, leaves) if n in self.needs]

        def backward(dys: Sequence[Tensor], keep: bool) -> list[Tensor]:
            return list(torch.autograd.grad(y, wanted, list(dys), retain_graph=keep))

        return tuple(t.detach() for t in y), backward


class Place(Protocol):
    """What is asked of a device here."""

    name: str
    backends: tuple[str, ...]


class Provider(NamedTuple):
    name: str
    function: Callable[[], Function]
    """Made when its turn comes."""
    directions: tuple[str, ...]
    """Of the case, those that it serves."""
    ours: bool = False
    slow: bool = False
    """It takes seconds to get ready."""


def providers(case: Case, device: Place, only: Sequence[str] = ()) -> list[Provider]:
    """Who serves the case on the device, ours first; of those named in ``only``, if any."""
    found = [
        Provider(b, lambda b=b: Ours(case, b), case.directions(), ours=True)  # type: ignore[misc]
        for b in device.backends
        if _has_kernel(case, b)
    ]
    if case.torch is not None:
        plain = case.torch
        found.append(Provider("torch", lambda: Theirs(case, Other(plain)), case.directions()))
        found += [
            Provider(
                name,
                lambda o=other: (o.made or partial(Theirs, other=o))(case),
                tuple(d for d in case.directions() if d in other.directions),
            )  # type: ignore[misc]
            for name, other in case.others.items()
            if installed(other.package) and (device.name == "cuda" or other.package == "torch")
        ]
        found.append(Provider("torch.compile", lambda: Theirs(case, _compiled(plain)), case.directions(), slow=True))
    return [p for p in found if not only or p.name in only]


def _has_kernel(case: Case, backend: str) -> bool:
    if backend == "definition":
        return True
    return dispatch.installed(backend) and hasattr(dispatch.kernels(backend, case.op), f"{case.op.name}_forward")


def _compiled(call: Callable) -> Other:
    # Cases of one family share code: past some recompilations dynamo would give up, and quietly run it eagerly.
    torch.compiler.reset()

    def plain(*inputs: Any) -> Any:
        return call(*inputs)

    return Other(torch.compile(plain, dynamic=False, fullgraph=True), context=_kept_buffers)


@contextlib.contextmanager
def _kept_buffers() -> Iterator[None]:
    """A backward that is timed alone runs again and again: it must not give away what the forward saved."""
    import torch._functorch.config as config

    with config.patch(donated_buffer=False):
        yield


def _tuple(y: Any) -> tuple:
    return y if isinstance(y, tuple) else () if y is None else (y,)
