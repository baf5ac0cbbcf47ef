"""Training a language model: on what, for how long, what is said of it, and what is left in its folder."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import gpulayers as gl
from gpulayers.language import _data
from gpulayers.language._data import Text
from gpulayers.language._model import NextTokenLoss
from gpulayers.language._report import Reporter, Settings, bits

BITS = "bits_per_character"


def train(
    text: Text, out: str, settings: Settings, *, resume: bool = False, torch: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Train on ``text``; everything is written below the folder ``out``: model, checkpoint, history, curve, samples.

    resume: go on from the checkpoint that is there, to the same bits as without the interruption. torch: by torch and
    gpulayers.torch, on the same rows from the same weights.

    Returns {"model", "plot", "history", "bits", "seconds"}. Raises ValueError if the text is shorter than a context, or the
    checkpoint is of other settings.
    """
    folder = pathlib.Path(out)
    data = _data.windows(text.train, settings.context)
    held_out = _data.each_once(text.held_out, settings.context)
    folder.mkdir(parents=True, exist_ok=True)  # what cannot be written fails before training
    _same_settings(folder / "settings.json", settings, resume, torch)
    gl.random.seed(settings.seed)
    model = settings.model()
    model.to(settings.device)
    report = Reporter(text, settings, _beside_bars if progress else lambda line: None)
    if torch:
        from gpulayers.language import _torch

        history = _torch.train(model, data, held_out, folder / "checkpoint.pt", settings, report, resume, progress)
    else:
        history = _natively(model, data, held_out, folder / "checkpoint", settings, report, resume, progress)
    gl.save(model, folder / "model")
    history.save(folder / "history.json")
    return {
        "model": str(folder / "model"),
        "plot": _plot(history, text, folder / "learning_curve.png"),
        "history": history,
        "bits": bits(history["val_loss"][-1], text),
        "seconds": sum(history["seconds"]),
    }


def _natively(
    model: gl.Sequential, data: Sequence, held_out: Any, checkpoint: pathlib.Path, settings: Settings,
    report: Reporter, resume: bool, progress: bool,
) -> gl.History:  # fmt: skip
    if progress:
        print(model.summary())
    how: dict[str, Any] = dict(lr=settings.rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay)
    optimizer = gl.AdamW(**how) if settings.optimizer == "adamw" else gl.Muon(others=settings.others, **how)
    return model.fit(
        *data,
        epochs=settings.epochs,
        steps_per_epoch=settings.steps,
        batch_size=settings.batch_size,
        loss=NextTokenLoss(),
        optimizer=optimizer,
        validation=held_out,
        clip_norm=settings.clip_norm,
        precision=settings.precision,
        callbacks=[report, gl.Checkpoint(checkpoint)],
        resume=checkpoint if resume else None,
        progress=progress,
    )


def _same_settings(path: pathlib.Path, settings: Settings, resume: bool, torch: bool) -> None:
    """Keep what a training is, or compare with what was kept. Raises ValueError where they differ."""
    now = dataclasses.asdict(settings) | {"torch": torch}
    if resume:
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != now:
            other = ", ".join(f"{k} {before.get(k)} → {now[k]}" for k in now if before.get(k) != now[k])
            raise ValueError(f"{path.parent}: resume: the rule is the settings of before; got {other}")
    path.write_text(json.dumps(now, indent=1), encoding="utf-8")


def _plot(history: gl.History, text: Text, path: pathlib.Path) -> str | None:
    """The learning curve in bits a character; None where matplotlib is not installed."""
    curve = gl.History()
    for loss, held_out in zip(history["loss"], history["val_loss"]):
        curve.add({BITS: bits(loss, text), f"val_{BITS}": bits(held_out, text)})
    return curve.plot_if_possible(path)


def _beside_bars(line: str) -> None:
    from tqdm.auto import tqdm

    tqdm.write(line)
