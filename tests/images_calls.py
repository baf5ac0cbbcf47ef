"""What torch's classes that resize, unfold and shuffle images are called with: (arguments, shape of the input)."""

from itertools import product

SEQUENCE, IMAGE, VOLUME = (2, 3, 5), (2, 4, 7, 6), (1, 2, 3, 4, 2)
FEW = [IMAGE, (1, 4, 5, 5), (0, 4, 5, 6)]
WINDOWS = product((2, (1, 3)), (1, (2, 1)), (1, (2, 0)), (1, (2, 3)))
OF_IMAGES = {
    "Upsample": [
        ({"size": (3, 9)}, IMAGE),
        *[({"scale_factor": 1.7, "mode": "nearest-exact"}, s) for s in (SEQUENCE, IMAGE, VOLUME)],
        *[({"scale_factor": (0.4, 2.2), "mode": "bilinear"}, s) for s in (*FEW, (4, 7, 6))],
        *[({"size": 5, "mode": "bilinear", "align_corners": True}, s) for s in (*FEW, (3, 4, 1, 9))],
        ({"scale_factor": 2.3, "mode": "bilinear", "recompute_scale_factor": True}, IMAGE),
        ({"size": (4, 11), "mode": "bicubic"}, IMAGE),
        *[({"scale_factor": 0.6, "mode": "area"}, s) for s in (SEQUENCE, IMAGE)],
        *[({"scale_factor": 1.5, "mode": "linear"}, s) for s in (SEQUENCE, IMAGE)],
        ({"size": (2, 5, 3), "mode": "trilinear"}, VOLUME),
    ],
    "UpsamplingNearest2d": [({"scale_factor": f}, s) for f in (2, 0.7) for s in FEW],
    "UpsamplingBilinear2d": [(o, s) for o in ({"size": 5}, {"scale_factor": (1.5, 0.8)}) for s in FEW],
    "Unfold": [
        ({"kernel_size": k, "dilation": d, "padding": p, "stride": t}, s)
        for k, d, p, t in WINDOWS
        for s in (*FEW, (4, 7, 6), (3, 4, 1, 9))
    ],
    "Fold": [
        ({"output_size": (4, 5), "kernel_size": 2, **o}, (*lead, 8, count))
        for o, count in (({}, 12), ({"padding": (1, 0), "stride": 2}, 6), ({"dilation": (3, 2)}, 3))
        for lead in ((2,), (), (0,))
    ],
    "PixelShuffle": [({"upscale_factor": r}, s) for r in (1, 2) for s in (IMAGE, (4, 3, 2), (2, 1, 4, 3, 2))],
    "PixelUnshuffle": [
        ({"downscale_factor": r}, s) for r in (1, 3) for s in ((2, 2, 6, 3), (2, 6, 9), (2, 1, 4, 3, 6))
    ],
    "ChannelShuffle": [({"groups": g}, s) for g in (1, 2, 4) for s in (IMAGE, (2, 4, 5), (0, 4, 3), (2, 4, 2, 3, 2))],
}
