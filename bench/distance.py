"""Distances and cosine similarity of embeddings, and rows of length 1."""

from __future__ import annotations

import math

import torch.nn.functional as F

from gpulayers.ops.distance import cosine_similarity, normalize, pairwise_distance, pdist

from .cases.case import ONE_ARCH, Case

_ROWS, _SMALL = (32768, 1024), (256, 512)


def cases() -> list[Case]:
    found = []
    for name, shape, cpu in (("small", _SMALL, True), ("embeddings", _ROWS, False)):
        found += [
            Case(pairwise_distance, name, (shape, shape), {}, F.pairwise_distance, cpu=cpu),
            Case(
                cosine_similarity,
                name,
                (shape, shape),
                {"axis": -1},
                lambda a, b: F.cosine_similarity(a, b, -1),
                cpu=cpu,
            ),
            Case(normalize, name, (shape,), {"axis": -1}, lambda x: F.normalize(x, dim=-1), cpu=cpu, headline=not cpu),
        ]
    image = (32, 256, 64, 64)
    return [
        *found,
        Case(normalize, "channels of images", (image,), {"axis": 1}, F.normalize, cpu=False),
        Case(cosine_similarity, "channels of images", (image, image), {"axis": 1}, F.cosine_similarity, cpu=False),
        Case(pdist, "4096 of 128", ((4096, 128),), {}, F.pdist, cpu=False),
    ]


def audits() -> list[Case]:
    image = (32, 256, 64, 64)
    return [
        Case(pairwise_distance, "rows", (_ROWS, _ROWS)),
        Case(pairwise_distance, "any p", (_ROWS, _ROWS), {"p": 3.5}, archs=ONE_ARCH),
        Case(pairwise_distance, "largest", (_ROWS, _ROWS), {"p": math.inf}, archs=ONE_ARCH),
        Case(cosine_similarity, "rows", (_ROWS, _ROWS), {"axis": -1}),
        Case(cosine_similarity, "channels", (image, image), {"axis": 1}, archs=ONE_ARCH),
        Case(normalize, "rows", (_ROWS,), {"axis": -1}),
        Case(normalize, "channels", (image,), {"axis": 1}, archs=ONE_ARCH),
        Case(normalize, "any p", (_ROWS,), {"axis": -1, "p": 3.5}, archs=ONE_ARCH),
        Case(pdist, "rows", ((4096, 128),)),
    ]
