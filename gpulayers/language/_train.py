"""Training a language model: on what, for how long, what is said of it, and what is left in its folder."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import gpulayers as gl
from gpulayers.language import _data
from gpulayers.language._data import Text
from gpulayers.language._generate import generate
from gpulayers.language._model import NextTokenLoss, gpt

BITS = "bits_per_character"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a training is: the same settings and text give the same bits.

    context, width, layers, heads: of the model. epochs of ``steps`` batches of ``batch_size`` windows. lr: the highest
    learning rate, after a fifth of an epoch; it falls to a twentieth along a cosine.
    """

    context: int = 128
    width: int = 128
    layers: int = 4
    heads: int = 4
    epochs: int = 10
    steps: int = 80
    batch_size: int = 16
    lr: float = 3e-3
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0
    device: str = "cpu"
    precision: str | None = None

    def __post_init__(self) -> None:
        for name in ("context", "width", "layers", "heads", "epochs", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"train text: {name}: the rule is an integer ≥ 1; got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"train text: the rule is heads that divide the width; got {self.heads} and {self.width}")

    def model(self) -> gl.Sequential:
        return gpt(context=self.context, width=self.width, layers=self.layers, heads=self.heads)

    def rate(self, step: int) -> float:
        """The learning rate of a step (from 0)."""
        total, rise = self.epochs * self.steps, max(1, self.steps // 5)
        fall = 0.05 + 0.475 * (1 + math.cos(math.pi * min(1.0, step / total)))
        return self.lr * fall * min(1.0, (step + 1) / rise)


Say = Callable[[str], Any]


class Reporter(gl.Callback):
    """After each epoch: what it reached, and how a text goes on by now. ``lines`` keeps it."""

    def __init__(self, text: Text, settings: Settings, say: Say = print):
        self.text, self.settings, self.say, self.lines = text, settings, say, []
        self.prompt = text.held_out[: min(32, settings.context)].tobytes()

    def on_epoch_end(self, run: Any) -> None:
        self.report(run.epoch, run.scores, run.model)

    def report(self, epoch: int, scores: Any, model: gl.Layer) -> None:
        """epoch: from 0. scores: mean losses in nats a token, ``loss`` and ``val_loss``."""
        loss, held_out = scores["loss"], scores["val_loss"]
        said = (
            f"epoch {epoch + 1}/{self.settings.epochs}: {bits(held_out, self.text):.3f} bits per character held out, "
            f"perplexity {math.exp(held_out):.2f}; in training {bits(loss, self.text):.3f}; {scores['seconds']:.1f} s"
        )
        sample = b"".join(generate(model, self.prompt, 80, seed=epoch))
        self.lines.append(f"{said}\n    {(self.prompt + sample).decode(errors='replace')!r}")
        self.say(self.lines[-1])


def bits(loss: float, text: Text) -> float:
    """Bits a character from nats a byte."""
    return loss / math.log(2) * text.per_character


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
    model = settings.model().to(settings.device)
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
    optimizer = gl.AdamW(lr=settings.rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay)
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
    try:
        curve.plot(path)
    except ImportError:
        return None
    return str(path)


def _beside_bars(line: str) -> None:
    from tqdm.auto import tqdm

    tqdm.write(line)
