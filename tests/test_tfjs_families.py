"""Convolutions, pools, paddings, resizing, windows and norms in TensorFlow.js: its own layer, a recorded class, or why not."""

import pytest
from npm import node_modules
from test_tfjs import TFJS, Case, faults, run

import gpulayers as gl
from gpulayers.export import ExportError

ROWS, IMAGES, VOLUMES = (2, 2, 7), (2, 2, 4, 5), (2, 2, 2, 3, 4)
OF_TFJS = [
    (gl.Conv1d(2, 3, 3, 2, 1), ROWS),
    (gl.Conv1d(2, 2, 4, padding="same", activation="silu", bias=False), ROWS),
    (gl.Conv2d(2, 2, 3, padding=1, activation="gelu"), IMAGES),
    (gl.ConvTranspose2d(2, 3, 3, 2, 1, 1), IMAGES),
    (gl.ConvTranspose2d(2, 3, (4, 1), (2, 3), (1, 0), activation="relu"), IMAGES),
    (gl.MaxPool1d(3, 2, 1), ROWS),
    (gl.AvgPool1d(2), ROWS),
    (gl.AvgPool3d((1, 2, 2)), VOLUMES),
    (gl.AdaptiveAvgPool1d(1), ROWS),
    (gl.AdaptiveAvgPool3d((1, 3, 2)), VOLUMES),
    (gl.AdaptiveMaxPool1d(1), ROWS),
    (gl.AdaptiveMaxPool2d((2, 1)), IMAGES),
    (gl.Sequential(gl.Embedding(5, 3), gl.Flatten(), gl.Linear(12, 2)), [2, 4]),
    (gl.Sequential(gl.EmbeddingBag(5, 3), gl.Linear(3, 2)), [2, 4]),
    (gl.Sequential(gl.Conv1d(2, 2, 3), gl.AdaptiveMaxPool1d(1), gl.Flatten(), gl.Linear(2, 2)), ROWS),
    (gl.Sequential(gl.Conv1d(2, 3, 3), gl.Softmax(1), gl.Parallel(gl.Conv1d(3, 2, 1), gl.MaxPool1d(1))), ROWS),
    (gl.Sequential(gl.AvgPool3d(1), gl.Softmax(-1), gl.AvgPool3d((2, 1, 1)), gl.Flatten()), VOLUMES),
]
RECORDED = [
    (gl.Conv1d(2, 2, 2, dilation=2, groups=2, padding=1, padding_mode="reflect"), ROWS),
    (gl.Conv2d(2, 1, 2, padding=1, padding_mode="replicate", activation="hardswish"), (2, 2, 2, 3)),
    (gl.Conv3d(2, 1, (1, 2, 2), activation="relu"), VOLUMES),
    (gl.ConvTranspose1d(2, 3, 3, 2, 1, 1), ROWS),
    (gl.ConvTranspose3d(2, 1, (1, 2, 1), 2), VOLUMES),
    (gl.MaxPool3d((1, 2, 2), 1), VOLUMES),
    (gl.AvgPool1d(3, 2, 1, count_include_pad=False), ROWS),
    (gl.AdaptiveMaxPool1d(3), ROWS),
    (gl.AdaptiveMaxPool3d((1, 1, 2)), VOLUMES),
    (gl.LPPool1d(2, 3, 2), ROWS),
    (gl.ConstantPad1d(1, 0.5), ROWS),
    (gl.ZeroPad2d((1, -1, 0, 2)), IMAGES),
    (gl.ZeroPad3d(1), VOLUMES),
    (gl.ReflectionPad1d(2), ROWS),
    (gl.ReplicationPad2d((2, 1, -1, 2)), IMAGES),
    (gl.CircularPad3d(1), VOLUMES),
    (gl.Upsample(scale_factor=2), IMAGES),
    (gl.Upsample(size=(3, 7), mode="bilinear", align_corners=True), IMAGES),
    (gl.Upsample(scale_factor=1.5, mode="bicubic"), IMAGES),
    (gl.Upsample(size=5, mode="area"), ROWS),
    (gl.Upsample(scale_factor=2, mode="trilinear"), VOLUMES),
    (gl.Unfold(2, padding=1, stride=2), IMAGES),
    (gl.Fold((3, 4), 2), (2, 8, 6)),
    (gl.PixelShuffle(2), (2, 4, 2, 3)),
    (gl.PixelUnshuffle(2), (2, 1, 4, 6)),
    (gl.ChannelShuffle(2), (2, 4, 3)),
    (gl.GroupNorm(2, 4), (2, 4, 5)),
    (gl.InstanceNorm2d(2, affine=True, track_running_stats=True), IMAGES),
    (gl.LocalResponseNorm(3), IMAGES),
    (gl.MultiHeadAttention(4, 2, 1, causal=True), (2, 3, 4)),
    (gl.RotaryEmbedding(2, 8), (2, 1, 3, 4)),
    (gl.GRU(2, 1, bidirectional=True), (2, 2, 2)),
]


def test_each_family_is_there_what_it_is_here(tmp_path):
    """Outputs and gradients, of TF.js's own layers and of recorded ones; and which of the two each is."""
    modules = node_modules(TFJS)
    table = [*OF_TFJS, *RECORDED]
    cases = [Case(tmp_path / str(i), layer, shape) for i, (layer, shape) in enumerate(table)]
    recorded = ["extends tf.layers.Layer" in (case.folder / "custom_layers.js").read_text() for case in cases]
    assert recorded == [False] * len(OF_TFJS) + [True] * len(RECORDED)
    assert not faults(cases, run(cases, modules, tmp_path))


@pytest.mark.parametrize(
    "layer, shape, reason",
    [
        (gl.Sequential(gl.MaxPool1d(2, return_indices=True), gl.MaxUnpool1d(2)), (None, 2, 8), "pass float32 on"),
        (gl.Embedding(5, 3, padding_idx=0), (None, 4), "trains every row alike"),
        (gl.EmbeddingBag(5, 3, "max"), (None, 4), "hold means"),
        (gl.FractionalMaxPool2d(2, 3), (None, 2, 6, 6), "cannot index by what is drawn"),
    ],
    ids=repr,
)
def test_what_cannot_be_held_says_why(layer, shape, reason, tmp_path):
    with pytest.raises(ExportError, match=reason) as refused:
        layer.export(tmp_path / "out", input_shapes=[shape])
    assert len(refused.value.refusals) == 1 and not (tmp_path / "out").exists()
