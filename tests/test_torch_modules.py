"""Every drop-in against torch.nn's own class: outputs, gradients, running statistics and errors, call by call."""

import itertools

import pytest
import torch
import torch.nn as nn
from images_calls import OF_IMAGES
from norm_calls import NORMS, local_response_norm
from torch_calls import (
    ANY,
    DEVICE,
    DTYPES,
    convolutions,
    draw,
    grid,
    padded,
    pooled,
    report,
    rows,
    some_layouts,
    telling,
    transposed,
)

import gpulayers.torch as gt
from gpulayers.testing import check_torch as check_torch_module
from gpulayers.testing.check_torch import check_torch
from gpulayers.testing.torch_cases import MADE_OF_OTHERS
from gpulayers.torch import functional

try:
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db
except ImportError:  # torch's own samples need expecttest, which a rented machine may lack
    op_db, module_db = [], []

TURNS = {torch.float16: 0, torch.bfloat16: 1, torch.float64: 1}
"""Every second call of a class, where it has many; float32 has all."""
LAZY = nn.modules.lazy.LazyModuleMixin
"""Classes that become others at their first call are judged by themselves (``test_conv.py``), and losses: ``test_torch_losses.py``."""
CLASSES = [
    n
    for n, c in vars(gt).items()
    if isinstance(c, type) and issubclass(c, nn.Module) and not issubclass(c, LAZY) and n not in MADE_OF_OTHERS
]
RANDOM = tuple(n for n in CLASSES if "Dropout" in n)
PAIRED = tuple(f"MaxUnpool{d}d" for d in (1, 2, 3))
"""They take indices, too: torch's own samples judge them, and ``test_unpooling.py``."""
IMAGES = [(2, 4, 7, 6), (4, 7, 6), (1, 4, 5, 5), (0, 4, 5, 6), (3, 4, 1, 9)]


def elementwise(*options):
    return [(kwargs, shape) for kwargs in options or ({},) for shape in ANY]


def images(*options, shapes=IMAGES):
    return [(kwargs, shape) for kwargs in options for shape in shapes]


def samples(shape, axes):
    """Of fractional pooling; 16 bits hold them."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 64, ((1, *shape)[-axes - 2], shape[-axes - 1], axes), generator=generator) / 64


POOL = grid(kernel_size=(1, 2, (3, 2)), stride=(None, 1, (2, 3)), padding=(0, 1), ceil_mode=(False, True))
# What each class is called with: (arguments, shape of the input).
CASES = {
    "ReLU": elementwise({}, {"inplace": True}),
    "ReLU6": elementwise({}, {"inplace": True}),
    "LeakyReLU": elementwise({}, {"negative_slope": -0.3}, {"negative_slope": 2.0, "inplace": True}),
    "Hardtanh": elementwise({}, {"min_val": -0.2, "max_val": 1.7}, {"inplace": True}),
    "Hardsigmoid": elementwise({}, {"inplace": True}),
    "Hardswish": elementwise({}, {"inplace": True}),
    "Hardshrink": elementwise({}, {"lambd": 0.1}),
    "Softshrink": elementwise({}, {"lambd": 0.1}, {"lambd": 0.0}),
    "Threshold": elementwise({"threshold": 0.1, "value": 20.0}, {"threshold": 0.0, "value": -1.0, "inplace": True}),
    "Sigmoid": elementwise(),
    "LogSigmoid": elementwise(),
    "SiLU": elementwise({}, {"inplace": True}),
    "Tanh": elementwise(),
    "Tanhshrink": elementwise(),
    "Softsign": elementwise(),
    "Softplus": elementwise({}, {"beta": 2.0, "threshold": 1.5}),
    "ELU": elementwise({}, {"alpha": 0.3}, {"inplace": True}),
    "CELU": elementwise({}, {"alpha": 0.3}, {"inplace": True}),
    "SELU": elementwise({}, {"inplace": True}),
    "Mish": elementwise({}, {"inplace": True}),
    "GELU": elementwise({}, {"approximate": "tanh"}),
    "GLU": [({"dim": d}, s) for d, s in [(-1, (3, 4)), (0, (2, 3, 4)), (1, (2, 6, 3, 3)), (-1, (0, 4)), (0, (4,))]],
    "PReLU": [({}, s) for s in ANY] + [({"num_parameters": 5}, (3, 5)), ({"num_parameters": 3}, (2, 3, 4, 4))],
    "RReLU": elementwise({}, {"lower": 0.3, "upper": 0.3}),
    "Softmax": [({"dim": d}, s) for s in ANY if s for d in {0, -1, len(s) // 2}] + [({"dim": 0}, ())],
    "LogSoftmax": [({"dim": d}, s) for s in ANY if s for d in {0, -1, len(s) // 2}] + [({"dim": 0}, ())],
    "Softmin": [({"dim": d}, s) for s in ANY if s for d in {0, -1, len(s) // 2}] + [({"dim": 0}, ())],
    "Softmax2d": [({}, s) for s in IMAGES],
    "Flatten": [({}, (2, 3, 4)), ({"start_dim": 0, "end_dim": 1}, (2, 3, 4))],
    "Linear": [
        ({"in_features": i, "out_features": o, "bias": b}, (*lead, i))
        for i, o, b in [(5, 7, True), (8, 1, False), (1, 3, True), (16, 16, True)]
        for lead in [(), (3,), (2, 3), (0,), (1, 1, 4)]
    ],
    **NORMS,
    **{
        f"MaxPool{d}d": pooled(d, {}, {"padding": 1}, {"dilation": 2, "ceil_mode": True}, {"return_indices": True})
        for d in (1, 3)
    },
    **{f"AvgPool{d}d": pooled(d, {}, {"padding": 1, "count_include_pad": False}, {"ceil_mode": True}) for d in (1, 3)},
    **{f"AdaptiveMaxPool{d}d": [({"output_size": n}, s) for n in (1, 3) for s in rows(d)] for d in (1, 2, 3)},
    **{
        f"FractionalMaxPool{d}d": [
            ({"kernel_size": 2, "output_size": 3, "_random_samples": samples(s, d)}, s)
            for s in ((2, 4, 7, 6, 5)[: 2 + d], (4, 5, 6, 7)[: 1 + d])
        ]
        for d in (2, 3)
    },
    **{
        f"LPPool{d}d": [
            ({"norm_type": p, "kernel_size": 2, "ceil_mode": c}, s) for p, c in ((2, True), (1, False)) for s in rows(d)
        ]
        for d in (1, 2, 3)
    },
    "AdaptiveAvgPool1d": [({"output_size": size}, s) for size in (1, 3, (9,)) for s in rows(1)],
    "AdaptiveAvgPool3d": [({"output_size": size}, s) for size in (1, 2, (2, None, 3)) for s in rows(3)],
    "MaxPool2d": images(*POOL, *grid(kernel_size=(2,), dilation=(2, (1, 2)), return_indices=(False, True))),
    "AvgPool2d": images(
        *POOL, *grid(kernel_size=(3,), padding=(1,), count_include_pad=(False,), divisor_override=(None, 7))
    ),
    "AdaptiveAvgPool2d": images(*grid(output_size=(1, 3, (2, None), (None, 5), (4, 9)))),
    "ConstantPad1d": [({"padding": p, "value": 3.5}, s) for p in (1, (-1, 2)) for s in rows(1)],
    "ConstantPad3d": [({"padding": p, "value": 3.5}, s) for p in (1, (-1, 2, 0, 1, 2, -1)) for s in rows(3)],
    **{f"{kind}Pad1d": padded(1) for kind in ("Zero", "Reflection", "Replication", "Circular")},
    **{f"{kind}Pad3d": padded(3) for kind in ("Zero", "Reflection", "Replication", "Circular")},
    "ConstantPad2d": images(*grid(padding=(1, (0, 2, 1, 3), (-1, 2, 0, -1)), value=(0.0, 3.5))),
    "ZeroPad2d": images(*grid(padding=(1, (0, 2, 1, 3), (-1, 2, 0, -1)))),
    "ReflectionPad2d": images(*grid(padding=(1, (0, 2, 1, 3)))),
    "ReplicationPad2d": images(*grid(padding=(1, (0, 2, 1, 9)))),
    "CircularPad2d": images(*grid(padding=(1, (0, 2, 1, 3)))),
    **OF_IMAGES,
    **{f"Conv{d}d": convolutions(d) for d in (1, 2, 3)},
    **{f"ConvTranspose{d}d": transposed(d) for d in (1, 2, 3)},
}


def in_32_bits(module):
    """For what torch has on a CPU in 32 and 64 bits alone."""

    def call(x, *others):
        wide = torch.promote_types(x.dtype, torch.float32)
        return module.to(wide)(x.to(wide), *others).to(x.dtype)

    return call


# Where torch computes with a constant rounded to float32, in float64 too, the truth is the formula. Its gradient of a
# padded average over channels-last images was wrong on CUDA until 2026: their row-major one is the truth. Of 16 bits and of
# some layouts it has no local response norm on the CPU.
TRUTH = {
    "AvgPool2d": lambda m: lambda x: m(x.contiguous()),
    # On a CPU torch has it in 32 and 64 bits, and not of every memory order.
    "AvgPool3d": lambda m: lambda x: m(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype),
    "LPPool3d": lambda m: lambda x: m(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype),
    "MaxPool3d": lambda m: lambda x: m(x.contiguous()),
    "LocalResponseNorm": local_response_norm,
    **dict.fromkeys(("MultiMarginLoss", "MultiLabelMarginLoss", "CTCLoss"), in_32_bits),
    "Hardsigmoid": lambda m: lambda x: torch.nn.functional.hardtanh(x, -3.0, 3.0) / 6 + 0.5,
    "Hardswish": lambda m: lambda x: x * torch.nn.functional.hardtanh(x + 3, 0.0, 6.0) / 6,  # on CUDA
    "CELU": lambda m: lambda x: torch.where(x > 0, x, m.alpha * torch.expm1(torch.clamp(x, max=0) / m.alpha)),
}


def pair_of(name, kwargs, dtype, training=True):
    """(ours, torch's) with equal weights and statistics."""
    theirs = getattr(nn, name)(**kwargs).to(DEVICE, dtype).train(training)
    for p in theirs.parameters():
        p.data = draw(p.shape, dtype, seed=p.numel(), scale=0.7)
    ours = getattr(gt, name)(**kwargs).to(DEVICE, dtype).train(training)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_every_class_is_judged():
    assert {n for n in CLASSES if not n.endswith("Loss")} == CASES.keys() | {
        *("Embedding", "EmbeddingBag"),
        *PAIRED,
        *("Bilinear", "PairwiseDistance", "CosineSimilarity"),
        *RANDOM,
    }


JUDGED = [(n, d) for n in CASES for d in DTYPES if (n, d) != ("RReLU", torch.float16)]  # of which torch has none


@pytest.mark.parametrize("name, dtype", JUDGED, ids=lambda v: str(v))
def test_module(name, dtype):
    complaints, compared = [], check_torch_module.compared
    for number, (kwargs, shape) in enumerate(CASES[name]):
        if dtype in TURNS and len(CASES[name]) > 9 and number % 2 != TURNS[dtype]:
            continue
        x = draw(shape, dtype, seed=number)
        modes = (True, False) if name.startswith(("BatchNorm", "InstanceNorm", "RReLU")) else (True,)
        for training, given in itertools.product(modes, some_layouts(x, number)):
            if name == "RReLU" and training and kwargs.get("lower") is None:
                continue  # random: judged below
            if kwargs.get("inplace") and 0 in given.stride() and given.numel() > 1:
                continue  # torch forbids it
            ours, theirs = pair_of(name, kwargs, dtype, training)
            if name in TRUTH and (dtype is torch.float64 or "Pool" in name or name == "LocalResponseNorm"):
                theirs = TRUTH[name](theirs)
            if kwargs.get("inplace"):
                a, b = ours, theirs
                ours, theirs = (lambda t, m=m: m(t.clone()) for m in (a, b))
            found = check_torch(ours, theirs, [given])
            complaints += [f"{name}({kwargs}) {list(shape)} strides {given.stride()}: {line}" for line in found]
    report(complaints)
    assert check_torch_module.compared > compared


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("Flatten", "RReLU")])
def test_non_finite(name):
    """NaN and Inf go through as in torch."""
    complaints = []
    for kwargs, shape in CASES[name][:16]:
        for number, value in enumerate((float("nan"), float("inf"), float("-inf"))):
            x = draw(shape, torch.float32, seed=number)
            if not x.numel() or kwargs.get("inplace"):
                continue
            x.view(-1)[:: max(1, x.numel() // 3)] = value
            ours, theirs = pair_of(name, kwargs, torch.float32)
            if shape in ANY:  # strided, and dy too: at NaN torch's vectors on the CPU differ from its CUDA kernels
                x = torch.stack([x, x], -1)[..., 0]
            found = check_torch(ours, theirs, [x], dy=None if shape in ANY else torch.randn_like)
            complaints += [f"{name}({kwargs}) {list(shape)} {value}: {line}" for line in found]
    report(complaints)


MODULES = [m for m in module_db if m.module_cls.__name__ in CLASSES and m.module_cls.__name__ not in RANDOM]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("info", MODULES, ids=lambda m: m.module_cls.__name__)
def test_torchs_own_module_samples(info, dtype):
    name = info.module_cls.__name__
    complaints = []
    for training in (True, False):
        samples = [*info.module_inputs_func(info, "cpu", dtype, requires_grad=False, training=training)]
        for sample in telling(samples) if len(samples) > 200 else samples:
            if sample.forward_input is None or (name == "RReLU" and training):
                continue
            args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
            theirs = getattr(nn, name)(*args, **kwargs).to(dtype).train(training)
            ours = getattr(gt, name)(*args, **kwargs).to(dtype).train(training)
            ours.load_state_dict(theirs.state_dict())
            if sample.forward_input.kwargs:
                assert sample.forward_input.kwargs == {"input": sample.forward_input.kwargs["input"]}
                sample.forward_input.args = (sample.forward_input.kwargs["input"],)
            if name in TRUTH and (
                dtype is torch.float64
                or "Pool" in name
                or name in ("LocalResponseNorm", "MultiMarginLoss", "MultiLabelMarginLoss", "CTCLoss")
            ):
                theirs = TRUTH[name](theirs)
            found = check_torch(ours, theirs, sample.forward_input.args)
            complaints += [f"{name}{args}{kwargs}: {line}" for line in found]
    report(complaints)


OUTSIDE = ("softmax", "log_softmax", "sigmoid", "tanh")
"""Functions whose samples are torch.softmax's and so on."""
OPS = {
    o.name.removeprefix("nn.functional."): o
    for o in op_db
    if o.name in OUTSIDE or (o.name.startswith("nn.functional.") and o.name[14:] in vars(functional))
    if not o.variant_test_name
}
VARIANTS = {
    f"{o.name.removeprefix('nn.functional.')}, {o.variant_test_name}": o
    for o in op_db
    if o.name.removeprefix("nn.functional.") in ("pad", "interpolate", "linear_cross_entropy", "softmin", *OUTSIDE)
    if o.variant_test_name
}


NOT_ALIKE = {
    **dict.fromkeys(
        ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
        "draws other numbers: test_torch_chance.py",
    ),
    "rrelu": "draws other numbers: test_torch_chance.py",
    "multi_head_attention_forward": "draws other numbers: test_torch_other_names.py",
    "fractional_max_pool2d": "draws its places: test_fractional_pooling.py",
    "fractional_max_pool3d": "draws its places: test_fractional_pooling.py",
}
MANY_ALIKE = ("gaussian_nll_loss", "poisson_nll_loss")
"""Functions of which torch has many samples of the same kinds."""
SAMPLED = [n for n in OPS if n not in NOT_ALIKE]


@pytest.mark.parametrize(
    "name, dtype",
    [*itertools.product(SAMPLED, (torch.float32, torch.bfloat16)), *((n, torch.float32) for n in VARIANTS)],
    ids=str,
)
def test_torchs_own_function_samples(name, dtype):
    info, most = (OPS | VARIANTS)[name], 200 if name in OPS and name not in MANY_ALIKE else 40
    name = name.partition(",")[0]
    if dtype not in info.dtypes:
        pytest.skip(f"torch has no samples of {name} in {dtype}")
    ours, theirs = getattr(functional, name), info.op
    if dtype is torch.float64 and name == "hardsigmoid":
        theirs = TRUTH["Hardsigmoid"](None)
    if name.startswith("embedding"):  # torch draws the table first
        ours = lambda weight, indices, **how: getattr(functional, name)(indices, weight, **how)  # noqa: E731
    complaints, compared = [], check_torch_module.compared
    samples = [*info.sample_inputs("cpu", dtype, requires_grad=False)]
    for sample in samples[:: max(1, len(samples) // most)]:
        if sample.kwargs.get("inplace") or sample.kwargs.get("sparse") or sample.kwargs.get("dropout_p"):
            continue
        if name == "embedding_bag" and sample.kwargs.get("scale_grad_by_freq"):
            continue  # torch's own divides by another row's count on the CPU: test_embedding_bag.py has it right
        # Tensors among the keywords are inputs too, of the other dtypes that the judge needs.
        names = [k for k, v in sample.kwargs.items() if isinstance(v, torch.Tensor)]
        fixed = {k: v for k, v in sample.kwargs.items() if k not in names}
        inputs = [sample.input, *sample.args, *(sample.kwargs[k] for k in names)]
        count = len(inputs) - len(names)
        call = [
            lambda *xs, f=f, n=count, names=names, fixed=fixed: f(*xs[:n], **dict(zip(names, xs[n:])), **fixed)
            for f in (ours, theirs)
        ]
        constant = 2 if name in ("batch_norm", "instance_norm") else 0  # running statistics
        grad = [not (1 <= i <= constant) and i < count for i in range(len(inputs))]
        found = check_torch(*call, inputs, grad=grad)
        complaints += [f"{name}{sample.summary()}: {line}" for line in found]
    report(complaints)
    assert check_torch_module.compared > compared


@pytest.mark.parametrize("name", [n for n in OPS if OPS[n].error_inputs_func is not None])
def test_torchs_own_errors(name):
    """What torch's own samples of wrong calls raise, ours raise too."""
    wrong = list(OPS[name].error_inputs("cpu"))
    assert wrong, "torch has samples of wrong calls"
    for bad in wrong:
        sample = bad.sample_input
        with pytest.raises(bad.error_type):
            getattr(functional, name)(sample.input, *sample.args, **sample.kwargs)


# --- a judge that cannot fail is none ---------------------------------------------------------------------------------


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.factor = backward
        return x * forward

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.factor, None, None


WRONG = {
    "values off": lambda m, x: m(x) * 1.001,
    "gradient off": lambda m, x: m(_Scaled.apply(x, 1.0, 1.01)),
    "no gradient": lambda m, x: m(x.detach()) + 0 * x,
    "shape": lambda m, x: m(x).unsqueeze(0),
    "dtype": lambda m, x: m(x).double(),
    "input changed": lambda m, x: m(x.data.add_(1) - 1 if False else (x.data.mul_(2), x / 2)[1]),
    "strides ignored": lambda m, x: m(torch.as_strided(x, x.shape, torch.empty(x.shape).stride())),
    "NaN": lambda m, x: m(x).masked_fill(torch.zeros_like(x, dtype=torch.bool), 0) + torch.nan,
    "only for negative": lambda m, x: torch.where(x < 0, m(x) * 1.01, m(x)),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_replacements_fail(what):
    module = nn.SiLU()
    x = torch.stack([draw((4, 5), torch.float32), draw((4, 5), torch.float32, 1)], -1)[..., 0]
    assert check_torch(lambda t: WRONG[what](module, t), module, [x])
    assert not check_torch(lambda t: module(t), module, [x])


def test_running_statistics_that_are_infinite_stay():
    x = torch.randn(8, 3)
    ours, theirs = gt.BatchNorm1d(3), nn.BatchNorm1d(3)
    for norm in (ours, theirs):
        norm.running_mean[0] = norm.running_var[1] = float("inf")
        norm(x)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
