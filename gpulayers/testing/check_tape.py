"""Whether the tapes of a call give the driver what its launchers give it, through Triton, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpulayers import arrays, dispatch
from gpulayers.arrays import Spec
from gpulayers.definition import Definition
from gpulayers.testing.check_op import CheckError
from gpulayers.testing.null_driver import Memory, NullDriver


def tensor(of: Any) -> Any:
    """A CPU tensor of a Spec, uninitialised and in no memory until somebody touches it; a list of them; None of None."""
    if of is None or isinstance(of, list):
        return of and [tensor(s) for s in of]
    return arrays.TORCH.empty(of, "cpu")


def check_tape(
    driver: NullDriver,
    memory: Memory,
    op: Definition,
    inputs: Sequence[Any],
    needs: Sequence[str] = (),
    lay: Callable[[Any], Any] = lambda dy: dy,
    **options: Any,
) -> dict[str, str]:
    """Call an op three times in each direction, and then by its launcher and by its tape, over the same memory.

    driver, memory: of ``null_driver()`` and ``same_memory()``. inputs: CPU tensors (lists of them, None), or Specs.
    lay: a dy (as its output lies in memory) as it shall come.
    Gives {direction: what ``explain`` says of it}; raises CheckError where tape and launcher differ in what they allocate,
    launch or return.
    """
    xs = [tensor(x) if isinstance(x, Spec | list) else x for x in inputs]

    def forward() -> Any:
        memory.keep()
        return dispatch.forward(op, xs, tuple(needs), options)

    forward(), forward()
    _, call = forward()
    plan, values = dispatch.plan_for(op, xs, tuple(needs), options)
    taped: Any = plan.run_forward
    found = {"forward": taped.state()}
    if found["forward"] == "taped":
        compare(driver, memory, op.name, taped, *xs, **values)
    if call is None:
        return found
    outputs = plan.rule.outputs.values()
    dys = tuple(lay(tensor(s)) if s.dtype in arrays.FLOATS else None for s in outputs)
    for _ in range(3):
        memory.keep()
        call.backward(*dys)
    taped = plan.run_backward
    found["backward"] = taped.state()
    if found["backward"] == "taped":
        compare(driver, memory, f"{op.name}, backward", taped, dys, call.saved, needs=plan.needs, **values)
    return found


def compare(driver: NullDriver, memory: Memory, name: str, taped: Any, *args: Any, **options: Any) -> None:
    """Raise CheckError where ``taped`` does another thing than its launcher."""
    memory.keep()
    expected, launches = driver.noted(lambda: taped.run(*args, **options))
    memory.give()
    run, taped.run = taped.run, _launcher_called
    try:
        got, replayed = driver.noted(lambda: taped(*args, **options))
    finally:
        taped.run, left = run, memory.left
        memory.keep()
    faults = [f"{len(launches)} launches, {len(replayed)} of the tape"] if len(launches) != len(replayed) else []
    for a, b in zip(launches, replayed):
        faults += [f"{a.kernel}: {f} is {x}, of the tape {y}" for f, x, y in zip(a._fields, a, b) if x != y]
    if left:
        faults.append(f"{len(left)} arrays are not allocated by the tape")
    if [*map(_place, _flat(expected))] != [*map(_place, _flat(got))]:
        faults.append("the tape returns other arrays")
    if faults:
        raise CheckError("\n".join([f"{name}: its tape and its launcher differ:", *faults]))


def _launcher_called(*args: Any, **options: Any) -> Any:
    raise CheckError("a taped call went to its launcher")


def _place(x: Any) -> Any:
    """Where an array lies, and how: of one that crossed a bridge, the object is another."""
    return x if x is None else (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype)


def _flat(found: Any) -> list[Any]:
    if isinstance(found, dict):
        return [x for k in sorted(found) for x in (k, found[k]) if not isinstance(x, str)]
    return [x for part in found for x in _flat(part)] if isinstance(found, tuple) else [found]


def replayed(call: Callable[[], Any], times: int = 3) -> Any:
    """What a call gives when it has been made often enough to be taped."""
    for _ in range(times):
        call()
    return call()
