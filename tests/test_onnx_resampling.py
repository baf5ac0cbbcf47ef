"""What changes an image's size or its channels' order, maxima by parts and norms over channels, as nodes of ONNX."""

import pytest
from test_onnx import IMAGE, held

import gpulayers as gl
from gpulayers.export import ExportError
from gpulayers.export.onnx import model_proto

CHANNELS, ROW, VOLUME = (None, 4, 6, 8), (None, 4, 6), (None, 2, 3, 4, 5)
NODES = [
    ("Resize", gl.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    ("Resize", gl.Upsample(size=(9, 5), mode="bilinear", align_corners=True), IMAGE),
    ("Resize", gl.Upsample(size=(9, 5)), IMAGE),
    ("Resize", gl.Upsample(scale_factor=1.7, mode="nearest-exact"), IMAGE),
    ("Resize", gl.Upsample(size=(4, 9), mode="bicubic"), IMAGE),
    ("Resize", gl.Upsample(scale_factor=(1.5,), mode="linear"), ROW),
    ("Resize", gl.Upsample(size=(2, 5, 7), mode="trilinear"), VOLUME),
    ("MaxPool", gl.AdaptiveMaxPool2d((3, 4)), CHANNELS),
    ("ReduceMax", gl.AdaptiveMaxPool3d(2), VOLUME),
    ("ReduceMax", gl.FractionalMaxPool2d(2, (4, 5)), IMAGE),
    ("LpPool", gl.LPPool2d(2, (2, 3), 2), IMAGE),
    ("DepthToSpace", gl.PixelShuffle(2), CHANNELS),
    ("Transpose", gl.PixelUnshuffle(2), CHANNELS),
    ("Transpose", gl.ChannelShuffle(2), CHANNELS),
    ("InstanceNormalization", gl.GroupNorm(2, 4), CHANNELS),
    ("InstanceNormalization", gl.InstanceNorm1d(4, affine=True), ROW),
    ("BatchNormalization", gl.InstanceNorm2d(2, track_running_stats=True), IMAGE),
    ("LRN", gl.LocalResponseNorm(3, 0.3, k=0.5), CHANNELS),
]
RECORDED = [
    (gl.AdaptiveMaxPool2d(2, return_indices=True), IMAGE),
    (gl.Upsample(size=(4, 5), mode="area"), IMAGE),
    (gl.LPPool2d(3, 2), IMAGE),
    (gl.LPPool1d(2, 4, ceil_mode=True), ROW),
    (gl.LocalResponseNorm(2), CHANNELS),
    (gl.Unfold((2, 3), stride=2, padding=1), IMAGE),
    (gl.Fold((4, 5), 2), (None, 8, 12)),
    (gl.LSTM(2, 3, proj_size=2), (None, 2, 2)),
]


@pytest.mark.parametrize("node, layer, shape", NODES, ids=lambda v: repr(v))
def test_nodes(node, layer, shape):
    proto = held(layer, [shape])
    assert not proto.functions and node in {n.op_type for n in proto.graph.node}


@pytest.mark.parametrize("layer, shape", RECORDED, ids=lambda v: repr(v))
def test_what_no_node_computes_is_recorded(layer, shape):
    assert [f.name for f in held(layer, [shape]).functions] == [type(layer).__name__]


@pytest.mark.parametrize(
    "layer, shapes, text",
    [
        (gl.MaxUnpool2d(2), [IMAGE, IMAGE], "counts places over the whole batch"),
    ],
    ids=repr,
)
def test_what_cannot_be_exported_says_why(layer, shapes, text):
    layer.ensure_built(*shapes)
    with pytest.raises(ExportError, match=text):
        model_proto(layer, shapes)
