"""Calls of torch.nn's classes over one to three spatial axes, (arguments, shape of the input), what calls are made of, and a
choice of torch's own samples."""

import itertools

import torch
from torch import Tensor

from gpulayers.testing.arena import has_gpu

DEVICE = "cuda" if has_gpu() else "cpu"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PLAIN_CPP = {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}
"""For a few lines of C++ Inductor need not compile its headers, nor six programs to find out which vectors there are."""
ANY = [(3, 5), (4,), (), (2, 3, 4), (2, 3, 4, 2), (0, 3), (1, 1), (33, 17)]


def grid(**axes):
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def draw(shape, dtype, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, dtype=torch.float64, generator=generator) * scale).to(DEVICE, dtype)


def layouts(x):
    """The same shape in other memory: as it comes, with gaps, transposed, channels last, expanded."""
    yield x
    if x.dim() and x.numel():
        yield torch.stack([x, x + 1], -1)[..., 0]
    if x.dim() > 1 and x.numel():
        yield x.transpose(0, -1).contiguous().transpose(0, -1)
        yield x[:1].expand(x.shape)
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)


def some_layouts(x, number):
    """x as it comes and in one other layout, in turn: every class has many calls, and meets them all."""
    first, *others = layouts(x)
    return [first, *([others[number % len(others)]] if others else [])]


def report(complaints):
    assert not complaints, f"{len(complaints)} calls differ:\n" + "\n".join(complaints[:20])


def convolutions(count):
    """Calls of Conv1d, Conv2d and Conv3d: options of three axes, cut to the last so many; every one of an image's."""
    cut = lambda kwargs: {k: v[-count:] if isinstance(v, tuple) else v for k, v in kwargs.items()}  # noqa: E731
    options = [
        {},
        {"stride": 2, "padding": 1, "bias": False},
        {"dilation": 2, "padding": (1, 2, 1)},
        {"groups": 2, "padding": "same"},
        {"groups": 4, "stride": (1, 2, 1)},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": (0, 2, 1), "padding_mode": "circular"},
        {"padding": "same", "padding_mode": "replicate"},
    ]
    sizes = (3, 7, 6)[-count:]
    shapes = [(2, 4, *sizes), (4, *sizes), (0, 4, *sizes)]
    fixed = {"in_channels": 4}
    found = [
        ({**fixed, "out_channels": o, "kernel_size": k, **cut(kwargs)}, s)
        for o in (4, 8) for k in (1, (2, 3, 2)[-count:]) for s in shapes for kwargs in options
    ]  # fmt: skip
    return found if count == 2 else found[:: 4 if count == 1 else 7]


def transposed(count):
    options = [
        {},
        {"stride": 2, "padding": 1, "output_padding": 1, "bias": False},
        {"dilation": 2, "padding": (1, 2, 1)[-count:], "stride": 3, "output_padding": 2},
        {"groups": 2, "stride": (1, 2, 3)[-count:]},
        {"groups": 4, "stride": 2, "padding": 1},
    ]
    sizes = (2, 5, 4)[-count:]
    shapes = [(2, 4, *sizes), (4, *sizes), (0, 4, *sizes)]
    fixed = {"in_channels": 4, "out_channels": 8}
    found = [({**fixed, "kernel_size": k, **o}, s) for k in ((2, 3, 2)[-count:], 4) for o in options for s in shapes]
    return found[:: 2 if count == 2 else 3]


def rows(count):
    """Sequences or volumes: a batch, one, none."""
    sizes = (5, 6, 7)[-count:]
    return [(2, 3, *sizes), (3, *sizes), (0, 3, *sizes)]


def pooled(count, *options):
    """Calls of pooling over sequences and volumes."""
    strides = (None, (1, 2, 3)[-count:])
    return [({"kernel_size": 3, "stride": s, **o}, shape) for o in options for s in strides for shape in rows(count)]


def padded(count):
    """Calls of padding of sequences and volumes."""
    return [({"padding": p}, s) for p in (1, (0, 2, 1, 3, 2, 0)[: 2 * count]) for s in rows(count)]


def telling(samples):
    """Those that bring an argument's value, or shapes of inputs, that none before did."""
    seen = set()
    for sample in samples:
        made, given = sample.constructor_input, sample.forward_input.args
        named = {**dict(enumerate(made.args)), **made.kwargs, "shapes": [(*t.shape, t.dtype) for t in given]}
        own = {(name, "" if isinstance(value, Tensor) else str(value)) for name, value in named.items()}
        if own - seen:
            yield sample
        seen |= own
