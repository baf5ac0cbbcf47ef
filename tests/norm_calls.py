"""What the classes of norms are called with: (arguments, shape of the input); and a truth that torch has not everywhere."""

import torch

NORMS = {
    "LayerNorm": [
        ({"normalized_shape": s[len(s) - k :], **o}, s)
        for s in [(3, 5), (4,), (2, 3, 4), (0, 3), (33, 17), (2, 1)]
        for k in range(1, len(s) + 1)
        for o in [{}, {"elementwise_affine": False}, {"bias": False, "eps": 1e-2}]
    ],
    "RMSNorm": [
        ({"normalized_shape": s[len(s) - k :], **o}, s)
        for s in [(3, 5), (4,), (2, 3, 4), (0, 3), (33, 17), (2, 1)]
        for k in range(1, len(s) + 1)
        for o in [{}, {"elementwise_affine": False}, {"eps": 1e-2}]
    ],
    "BatchNorm1d": [
        ({"num_features": s[1], **o}, s)
        for s in [(3, 5), (2, 3, 4), (7, 1), (0, 3), (4, 2, 1)]
        for o in [
            {},
            {"affine": False},
            {"track_running_stats": False},
            {"momentum": None},
            {"momentum": 0.7, "eps": 0.1},
        ]
    ],
    "BatchNorm2d": [
        ({"num_features": s[1], **o}, s)
        for s in [(2, 4, 7, 6), (1, 4, 5, 5), (0, 4, 5, 6), (3, 1, 2, 9)]
        for o in [
            {},
            {"affine": False},
            {"track_running_stats": False},
            {"momentum": None},
            {"momentum": 0.7, "eps": 0.1},
        ]
    ],
    "BatchNorm3d": [
        ({"num_features": 4, **o}, s) for s in [(2, 4, 3, 2, 5), (0, 4, 2, 2, 2)] for o in [{}, {"affine": False}]
    ],
    "GroupNorm": [
        ({"num_groups": g, "num_channels": s[1], **o}, s)
        for s, g in [((2, 6), 3), ((3, 4, 5), 4), ((2, 6, 7, 5), 2), ((2, 4, 3, 2, 4), 1), ((0, 4, 5), 2), ((4, 3), 3)]
        for o in [{}, {"affine": False, "eps": 0.1}, {"bias": False}]
    ],
    **{
        f"InstanceNorm{d}d": [
            ({"num_features": 3, **o}, (*lead, 3, *(5, 4, 2)[:d]))
            for lead in [(2,), (), (1,)]
            for o in [
                {},
                {"affine": True, "track_running_stats": True},
                {"track_running_stats": True, "momentum": 0.7, "eps": 0.1},
            ]
        ]
        for d in (1, 2, 3)
    },
    "LocalResponseNorm": [
        ({"size": size, **o}, s)
        for s in [(2, 4, 5), (3, 6, 4, 3), (1, 3, 2, 2, 3), (0, 3, 2), (2, 1, 3)]
        for size in (1, 2, 5, 9)
        for o in [{}, {"alpha": 0.3, "beta": 0.5, "k": 2.0}]
    ],
}


def local_response_norm(m: torch.nn.LocalResponseNorm):
    """torch.nn.LocalResponseNorm's formula, of any dtype and layout."""

    def call(x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return m(x)
        padded = torch.nn.functional.pad(x.square().transpose(1, -1), (m.size // 2, (m.size - 1) // 2)).transpose(1, -1)
        total = sum(padded[:, t : t + x.shape[1]] for t in range(m.size))
        return x / (total * (m.alpha / m.size) + m.k) ** m.beta

    return call
