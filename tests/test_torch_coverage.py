"""gpulayers.torch in the place of torch.nn: what it computes itself, and what is torch's own."""

import inspect

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

import gpulayers.torch as gt  # noqa: E402


def test_what_computes_nothing_is_torchs_own():
    assert gt.Sequential is nn.Sequential and gt.Module is nn.Module and gt.init is nn.init
    assert gt.functional.has_torch_function is nn.functional.has_torch_function
    assert {"Linear", "Sequential", "patch"} <= set(dir(gt)) and {"relu", "has_torch_function"} <= set(
        dir(gt.functional)
    )


@pytest.mark.parametrize("module", (gt, gt.functional))
def test_a_name_that_neither_has(module):
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'Liner', nor has torch.nn"):
        module.Liner  # noqa: B018


def test_every_name_has_a_state():
    found = gt.coverage()
    assert found.classes.keys() == {n for n in dir(nn) if inspect.isclass(getattr(nn, n))}
    for names, ours, theirs in ((found.classes, gt, nn), (found.functions, gt.functional, nn.functional)):
        for name, state in names.items():
            own = getattr(ours, name) is not getattr(theirs, name)
            assert own == (state == "kernels") or name == "Flatten", name
    assert found.classes["Linear"] == "kernels" and found.classes["ModuleList"] == "view, container or helper"
    left = {n for names in (found.classes, found.functions) for n in names if names[n] == "left to torch"}
    assert left <= {"CrossMapLRN2d", "grouped_mm", "scaled_mm", "scaled_grouped_mm"} and ": no kernel" not in str(found)
    row = next(line.split() for line in str(found).splitlines() if line.startswith("torch.nn "))
    assert row[1] == str(len(found.classes)) and sum(map(int, row[2:])) == len(found.classes)
