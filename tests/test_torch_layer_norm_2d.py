"""Layer norms of each pixel's channels, as torchvision and timm have them, in a patched model."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from test_torch_patch import classes  # noqa: E402

import gpulayers.torch as gt  # noqa: E402


class LayerNorm2d(nn.LayerNorm):
    """As torchvision has it; timm, too, but for its fast norm."""

    _fast_norm = False

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


def test_layer_norms_of_pixels():
    torch.manual_seed(0)
    plain = nn.Sequential(LayerNorm2d(4, eps=0.1), LayerNorm2d(4, elementwise_affine=False))
    nn.init.normal_(plain[0].weight), nn.init.normal_(plain[0].bias)
    model = copy.deepcopy(plain)
    report = gt.patch(model)
    assert set(report.replaced) == {"0", "1"} and "gpulayers.torch's layer_norm" in str(report)
    for like in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 4, 3, 5).contiguous(memory_format=like).requires_grad_()
        found = []
        for each in (plain, model, pickle.loads(pickle.dumps(model))):
            y = each(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), (x, *each.parameters()))])
        for ours in found[1:]:
            torch.testing.assert_close(ours, found[0], rtol=1e-4, atol=1e-5)
            assert ours[0].stride() == found[0][0].stride() and ours[1].stride() == x.stride()
    torch.jit.script(model)
    gt.unpatch(model)
    assert classes(model) == classes(plain)


def test_layer_norms_that_are_others_stay():
    class Other(LayerNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    class Fast(LayerNorm2d):
        _fast_norm = True

    class OfVolumes(LayerNorm2d):
        def forward(self, x):
            return F.layer_norm(x.permute(0, 2, 3, 4, 1), self.normalized_shape).permute(0, 4, 1, 2, 3)

    for c in (Other, Fast, OfVolumes):
        c.__name__ = "LayerNorm2d"
    model = nn.ModuleList([Other(4), Fast(4), LayerNorm2d((3, 4)), OfVolumes(4), type("Mine", (LayerNorm2d,), {})(4)])
    had = classes(model)
    left = gt.patch(model).left
    assert classes(model) == had
    assert left["0"] == "on a random input it computes something else" and "fast norm" in left["1"]
    assert "one axis" in left["2"] and "fails on a random input" in left["3"]
    assert left["4"] == "a class derived from torch.nn.LayerNorm"
