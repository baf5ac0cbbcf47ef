"""What only a GPU can show: streams, CUDA graphs, the same bits in every run and from every library, and huge arrays."""

import contextlib

import numpy as np
import pytest

import gpulayers as gl
from gpulayers import arrays, dispatch, launch, transfer
from gpulayers.ops.activation import celu, gelu, glu, prelu, relu, rrelu, silu
from gpulayers.ops.conv import conv, conv_transpose
from gpulayers.ops.dropout import dropout
from gpulayers.ops.linear import linear
from gpulayers.ops.loss import cross_entropy, mse, nll_loss, pointwise_loss, row_loss
from gpulayers.ops.norm import add_layer_norm, add_rms_norm, batch_norm, conv_batch_norm, layer_norm, rms_norm
from gpulayers.ops.optim import adamw_update, sgd_update
from gpulayers.ops.padding import pad
from gpulayers.ops.pooling import adaptive_avg_pool, avg_pool, max_pool
from gpulayers.ops.resize import interpolate
from gpulayers.ops.softmax import log_softmax, softmax, softmin
from gpulayers.ops.window import pixel_shuffle, unfold
from gpulayers.testing.arena import arena, has_gpu

torch = pytest.importorskip("torch")
gt = pytest.importorskip("gpulayers.torch")
pytestmark = pytest.mark.skipif(not has_gpu(), reason="no GPU here")

DEVICE = "cuda"
HUGE = 2**31 // 4096 + 3  # rows of 4096: more than 2^31 elements
SEED = np.array([7, 0])
LABELS = np.arange(64) * 7 % 1000
OPS = [
    (softmax, [(64, 1000)], {}),
    (log_softmax, [(3, 40000)], {}),
    (softmin, [(64, 1000)], {}),
    (gelu, [(65, 1031)], {}),
    (relu, [(4, 16, 8, 8)], {}),
    (celu, [(65, 1031)], {"alpha": 0.5}),
    (prelu, [(4, 16, 9, 9), (16,)], {}),
    (prelu, [(130, 1000), (1,)], {}),
    (rrelu, [(65, 1031), SEED], {"training": True}),
    (glu, [(65, 1030)], {}),
    (layer_norm, [(130, 1000), (1000,), (1000,)], {"normalized_shape": (1000,)}),
    (rms_norm, [(2, 40000), (40000,)], {"normalized_shape": (40000,)}),
    (add_layer_norm, [(130, 1000), (130, 1000), (1000,), (1000,)], {"normalized_shape": (1000,)}),
    (add_rms_norm, [(2, 40000), (2, 40000), (40000,)], {"normalized_shape": (40000,)}),
    (add_rms_norm, [(300, 20000), (300, 20000), (20000,)], {"normalized_shape": (20000,)}),
    (batch_norm, [(8, 48, 9, 9), (48,), (48,)], {"training": True}),
    (
        conv_batch_norm,
        [(4, 32, 14, 14), (64, 32, 3, 3), (64,), (64,), (64,)],
        {"padding": 1, "training": True, "activation": "relu"},
    ),
    (cross_entropy, [(64, 1000), LABELS], {"label_smoothing": 0.1}),
    (nll_loss, [(64, 1000), LABELS, (1000,)], {}),
    (mse, [(33, 1000), (33, 1000)], {}),
    (row_loss, [(33, 1000), (33, 1000), (33, 1000)], {"loss": "triplet_margin", "swap": True}),
    (pointwise_loss, [(33, 1000), (33, 1000), None, (1000,)], {"loss": "bce_with_logits"}),
    (linear, [(256, 512), (384, 512), (384,)], {"activation": "gelu"}),
    (linear, [(33, 1000), (100, 1000), (100,)], {}),
    (conv, [(4, 32, 14, 14), (64, 32, 3, 3), (64,)], {"padding": 1, "stride": 2}),
    (conv, [(4, 32, 14, 14), (32, 1, 3, 3), (32,)], {"padding": 1, "groups": 32}),
    (conv, [(2, 32, 6, 9, 9), (64, 32, 3, 3, 3), (64,)], {"padding": 1, "stride": 2}),
    (conv, [(2, 32, 6, 9, 9), (32, 1, 3, 3, 3), (32,)], {"padding": 1, "groups": 32}),
    (conv_transpose, [(4, 32, 70), (32, 48, 4), (48,)], {"padding": 1, "stride": 2}),
    (max_pool, [(4, 32, 15, 15)], {"kernel_size": 3, "stride": 2, "padding": 1}),
    (avg_pool, [(4, 32, 15, 15)], {"kernel_size": 2}),
    (adaptive_avg_pool, [(4, 32, 30, 30)], {"output_size": 1}),
    (adaptive_avg_pool, [(4, 32, 15, 15)], {"output_size": 6}),
    (pad, [(4, 32, 15, 15)], {"padding": 2, "mode": "replicate"}),
    (interpolate, [(4, 32, 15, 15)], {"size": (30, 9), "mode": "linear"}),
    (unfold, [(4, 32, 15, 15)], {"kernel_size": 3, "padding": 1, "stride": 2}),
    (pixel_shuffle, [(4, 32, 15, 15)], {"upscale_factor": 4}),
    (dropout, [(65, 1031), SEED], {"p": 0.25}),
]
CALLS = [
    pytest.param(backend, *call, id=f"{backend}-{call[0].name}-{i}")
    for i, call in enumerate(OPS)
    for backend in ("triton", "cuda")
    if dispatch.installed(backend) and hasattr(dispatch.kernels(backend, call[0]), f"{call[0].name}_forward")
]
every_call = pytest.mark.parametrize("backend, op, shapes, options", CALLS)
needs_cupy = pytest.mark.skipif(not dispatch.installed("cuda"), reason="CuPy is not installed")


def drawn(shapes, dtype="bfloat16", seed=0):
    """Tensors on the GPU; what is an array already is taken as it is."""
    random = np.random.default_rng(seed)
    host = [s if isinstance(s, np.ndarray) else random.standard_normal(s).astype(arrays.dtype(dtype)) for s in shapes]
    return [transfer.numpy_to_torch(x.copy()).to(DEVICE) for x in host]


def both(op, inputs, options):
    """Outputs and gradients; dy is the output."""
    y, call = op.record(*inputs, **options)
    ys = y if isinstance(y, tuple) else (y,)
    return [*ys, *(g for g in call.backward(*ys) if g is not None)]


def bits(results):
    return [np.ascontiguousarray(transfer.to_numpy(r)).tobytes() for r in results]


@every_call
def test_the_same_bits_every_time(backend, op, shapes, options):
    inputs = drawn(shapes)
    with arena(backend):
        first = bits(both(op, inputs, options))
        assert all(bits(both(op, inputs, options)) == first for _ in range(19))


@every_call
def test_on_a_stream_of_torch(backend, op, shapes, options):
    """The inputs arrive on a side stream, after it has been busy: a kernel on another stream would not see them."""
    source = drawn(shapes)
    with arena(backend):
        expected = bits(both(op, source, options))
        inputs = [torch.zeros_like(x) for x in source]
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            for x, value in zip(inputs, source):
                x.copy_(value)
            results = both(op, inputs, options)
        side.synchronize()
    assert bits(results) == expected


@needs_cupy
@every_call
@pytest.mark.parametrize("which", ["default", "side"])
def test_cupy_arrays_and_streams(backend, op, shapes, options, which):
    """CuPy's arrays give the bits that torch's give, on CuPy's default stream and on another one."""
    import cupy

    source = drawn(shapes)
    with arena(backend):
        expected = bits(both(op, source, options))
        given = [transfer.torch_to_cupy(x) for x in source]
        inputs = [cupy.zeros_like(x) for x in given]
        torch.cuda.synchronize()
        busy = torch.empty(1 << 28, device=DEVICE, dtype=torch.uint8)
        side = cupy.cuda.Stream(non_blocking=True) if which == "side" else contextlib.nullcontext()
        with side:
            work = transfer.torch_to_cupy(busy)
            for _ in range(50):
                work += 1
            for x, value in zip(inputs, given):
                x[...] = value
            results = both(op, inputs, options)
        cupy.cuda.Device().synchronize()
    assert all(isinstance(r, cupy.ndarray) for r in results)
    assert bits(results) == expected


def captured(run):
    """A CUDA graph of ``run``, after two runs on a side stream; and what the graph writes its results to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@every_call
def test_cuda_graphs(backend, op, shapes, options):
    """A captured call computes again, from new inputs in the same memory."""
    inputs, others = drawn(shapes), drawn(shapes, seed=1)
    with arena(backend):
        graph, results = captured(lambda: both(op, inputs, options))
        for given in (others, drawn(shapes, seed=2)):
            for x, value in zip(inputs, given):
                x.copy_(value)
            junk = [torch.full((1 << 20,), float("nan"), device=DEVICE) for _ in range(8)]  # what was freed is reused
            graph.replay()
            torch.cuda.synchronize()
            assert bits(results) == bits(both(op, given, options))
            del junk


@every_call
@pytest.mark.parametrize("library", ["torch", pytest.param("cupy", marks=needs_cupy)])
def test_tapes(backend, op, shapes, options, library):
    """Replayed calls give the bits that launched ones give, from other inputs, and in a CUDA graph."""
    inputs, others = drawn(shapes), drawn(shapes, seed=1)
    if library == "cupy":
        inputs, others = ([*map(transfer.torch_to_cupy, xs)] for xs in (inputs, others))

    def run(given):
        y, call = op.record(*given, **options)
        ys = y if isinstance(y, tuple) else (y,)
        return [*ys, *(g for g in call.backward(*(t + 0 for t in ys)) if g is not None)]

    with dispatch.only(backend), gl.strict():
        with launch.off():
            expected = bits(run(others))
        for _ in range(4):
            run(inputs)
        needs = [n for n, x in zip(op.inputs, inputs) if n in op.differentiable]
        assert set(gl.explain(op, *inputs, needs=needs, **options).taped.values()) == {"taped"}
        assert bits(run(others)) == expected
        if library == "torch":
            graph, results = captured(lambda: run(inputs))
            for x, value in zip(inputs, others):
                x.copy_(value)
            graph.replay()
            torch.cuda.synchronize()
            assert bits(results) == expected


@pytest.mark.parametrize("op, lists", [(sgd_update, 3), (adamw_update, 4)])
def test_optimizers_in_cuda_graphs(op, lists):
    shapes = [(300, 300), (7,), (20000,)] * 5
    options = {"momentum": 0.9} if op is sgd_update else {}
    eager = [[t.abs() for t in drawn(shapes, "float32", seed)] for seed in range(lists)]
    mine = [[t.clone() for t in each] for each in eager]
    with arena("triton"):
        op(*[[t.clone() for t in each] for each in eager], **options)  # arrays of these sizes are known from here on
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            op(*mine, **options)
        for _ in range(3):
            graph.replay()
            op(*eager, **options)
        torch.cuda.synchronize()
    assert [bits(each) for each in mine] == [bits(each) for each in eager]


def patched(p):
    """A patched model with dropout by p, a batch, and what measures its outputs."""
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 64),
        nn.LayerNorm(64), nn.GELU(), nn.Dropout(p), nn.RReLU() if p else nn.PReLU(), nn.Linear(64, 10),
    ).to(DEVICE)  # fmt: skip
    gt.patch(model)
    batch = torch.randn(32, 3, 8, 8, device=DEVICE), torch.arange(32, device=DEVICE) % 10
    return model, batch, gt.CrossEntropyLoss()


def trained(graphed):
    """The weights after four steps and, with a lower lr, three more."""
    model, (x, y), loss_of = patched(0.0)
    lr = torch.tensor(1e-2, device=DEVICE)
    optimizer = gt.optim.AdamW(model.parameters(), lr=lr, capturable=True)

    def step():
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()

    repeat, done = step, 0
    if graphed:
        repeat, done = captured(step)[0].replay, 2  # the steps before it; the capture itself moves nothing
    for i in range(done, 7):
        lr.fill_(1e-2 if i < 4 else 1e-3)
        repeat()
    torch.cuda.synchronize()
    return bits([p.detach() for p in model.parameters()])


@pytest.mark.filterwarnings("ignore:.*capturable=True")  # torch's, of the steps before the capture
def test_a_whole_step_in_a_cuda_graph():
    """Forward, backward and a capturable AdamW whose lr is on the GPU, replayed: the weights of as many eager steps."""
    assert trained(graphed=True) == trained(graphed=False)


def test_each_replay_draws_anew():
    """Seeds come from torch's generator, which a graph moves on."""
    model, (x, _), _ = patched(0.5)
    graph, y = captured(lambda: model(x).detach())
    seen = set()
    for _ in range(3):
        graph.replay()
        seen.add(bits([y])[0])
    assert len(seen) == 3


@pytest.mark.parametrize("how", ["make_graphed_callables", "reduce-overhead"])
def test_models_whose_passes_are_graphs(how):
    gradients = []
    for graphed in (False, True):
        model, (x, y), loss_of = patched(0.0)
        run = model
        if graphed and how == "reduce-overhead":
            run = torch.compile(model, mode=how)
        elif graphed:
            run = torch.cuda.make_graphed_callables(model, (x.clone(),))
        for _ in range(4):
            model.zero_grad()
            loss_of(run(x), y).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for mine, eager in zip(*reversed(gradients)):
        torch.testing.assert_close(mine, eager, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["GPT", "ResNet"])
def test_inductors_code_launches_the_kernels(name):
    """Loss, gradients and statistics of a compiled step are those of eager launches; no op of ours is called."""
    from gpulayers.bench.models.gpt import GPT
    from gpulayers.bench.models.kind import NextToken, WithLoss
    from gpulayers.bench.models.resnet import ResNet
    from torch._inductor.utils import run_fw_bw_and_get_code

    torch.manual_seed(0)
    if name == "GPT":
        model, batch = WithLoss(GPT(512, 128, 4, 2, 64, 0.0), NextToken()), [*torch.randint(512, (2, 4, 64))]
    else:
        model = WithLoss(ResNet((1, 1), 16, 10), torch.nn.CrossEntropyLoss())
        batch = [torch.randn(8, 3, 64, 64), torch.randint(10, (8,))]
    gt.patch(model.to(DEVICE))
    batch = [t.to(DEVICE) for t in batch]
    before = {k: t.clone() for k, t in model.state_dict().items()}
    found = []
    for compiled in (True, False):
        model.load_state_dict(before)
        model.zero_grad()
        if compiled:
            step = torch.compile(model, fullgraph=True)
            total, codes = run_fw_bw_and_get_code(lambda step=step: step(*batch))
            assert len(codes) == 2 and all("_kernel_" in c and "torch.ops.gpulayers" not in c for c in codes)
        else:
            total = model(*batch)
            total.backward()
        found.append(
            [total.detach(), *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]
        )
    for mine, eager in zip(*found):
        torch.testing.assert_close(mine, eager, rtol=1e-3, atol=1e-4)


def test_inductors_code_makes_tensor_descriptors():
    """On sm_90 and newer; with another batch, too: the very bits of an eager launch."""
    layer = gt.Linear(256, 384).to(DEVICE, torch.bfloat16)
    run = torch.compile(layer, fullgraph=True, dynamic=True)
    for n in (128, 200):
        x = torch.randn(n, 256, device=DEVICE, dtype=torch.bfloat16)
        with torch.no_grad():
            assert torch.equal(run(x), layer(x))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_draws_what_the_cpu_draws(p):
    x = np.random.default_rng(0).standard_normal((33, 1031)).astype(np.float32)
    with arena("triton"):
        y = dropout(*drawn([x, SEED]), p=p)
    with gl.only("definition"):
        np.testing.assert_array_equal(transfer.to_numpy(y), dropout(x, SEED, p=p))


def test_a_label_out_of_range_gives_nan():
    """Looking at the labels would mean to wait for the GPU."""
    wrong = LABELS.copy()
    wrong[3] = 1000
    with arena("triton"):
        loss, dx, *_ = both(cross_entropy, drawn([(64, 1000), wrong]), {})
        fine = cross_entropy(*drawn([(64, 1000), LABELS]))
    assert np.isnan(transfer.to_numpy(loss)) and np.isnan(transfer.to_numpy(dx)).any()
    assert np.isfinite(transfer.to_numpy(fine))


@pytest.mark.parametrize("precision, rtol", [("float32", 1e-3), ("bfloat16", 0.05), ("float16", 0.05)])
def test_training_follows_the_cpu(precision, rtol):
    random = np.random.default_rng(0)
    x = random.standard_normal((160, 3, 8, 8), dtype=np.float32)
    y = (x[:, 0].mean((1, 2)) > 0).astype(np.int64)

    def losses(device):
        gl.random.seed(1)
        model = gl.Sequential(
            gl.Conv2d(3, 8, 3, padding=1), gl.BatchNorm2d(8), gl.ReLU(), gl.MaxPool2d(2), gl.Flatten(),
            gl.Dropout(0.1), gl.Linear(128, 32), gl.LayerNorm(32), gl.GELU(), gl.Linear(32, 2),
        )  # fmt: skip
        fixed = {"epochs": 2, "batch_size": 32, "progress": False, "optimizer": gl.AdamW(1e-3)}
        return model.to(device).fit(x, y, precision=precision, **fixed)["loss"]

    cpu = losses("cpu")
    with gl.strict():
        gpu = losses(DEVICE)
    np.testing.assert_allclose(gpu, cpu, rtol=rtol)


@pytest.mark.parametrize(
    "op, theirs",
    [
        (softmax, lambda x: torch.softmax(x, -1)),
        (silu, torch.nn.functional.silu),
        (layer_norm, lambda x: torch.nn.functional.layer_norm(x, (4096,))),
    ],
    ids=lambda f: getattr(f, "name", ""),
)
def test_more_than_2_to_the_31_elements(op, theirs):
    """The last rows are right, forward and backward: offsets are 64 bits wide."""
    if has_gpu() and torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("too little free memory on this GPU: 20 GiB")
    torch.manual_seed(0)
    x = torch.randn(HUGE, 4096, device=DEVICE, dtype=torch.bfloat16)
    with arena("triton"):
        y, dx = both(op, [x], {"normalized_shape": (4096,)} if op is layer_norm else {})
    for rows in (slice(0, 2), slice(-2, None)):
        part = x[rows].float().requires_grad_()
        truth = theirs(part)
        (slope,) = torch.autograd.grad(truth, part, y[rows].float())
        for mine, true in ((y[rows], truth), (dx[rows], slope)):
            off = (mine.float() - true).abs().max() / true.abs().max()
            assert off < 2**-6, f"off by {off:.3g} of the largest"
    del x, y, dx
    torch.cuda.empty_cache()  # other processes test on this GPU, too
