"""What ``gpulayers fuse`` writes, and what ``gpulayers check`` says of it."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import gpulayers as gl
from gpulayers import dispatch
from gpulayers.fusing import Split, by_hand, fusion


def write(layer: gl.Layer, shapes: Sequence[tuple], out: pathlib.Path | None) -> str:
    """The text of the layer's kernels and their launchers, written to ``out`` where that is a new file.

    Raises FusionError for a layer that cannot be fused, FileExistsError for a file that is there.
    """
    text = by_hand(fusion(layer, *shapes))
    if out is not None:
        with open(out, "x", encoding="utf-8") as file:
            file.write(text)
    return text


def said(layer: gl.Layer, shapes: Sequence[tuple]) -> str:
    """Whether ``gl.fuse`` takes the layer, in a line."""
    try:
        made, _ = (fusion(layer, *shapes, training=training) for training in (True, False))
    except gl.FusionError as error:
        return f"gl.fuse refuses it: {str(error).partition('it cannot be fused: ')[2]}"
    needs = "" if dispatch.installed("triton") else ", where Triton is"
    if isinstance(made, Split):
        return (
            f"gl.fuse cuts it into {len(made.parts)} Triton kernels, with {len(made.between)} ops between them{needs}"
        )
    return f"gl.fuse makes it one Triton kernel each way{needs}"
