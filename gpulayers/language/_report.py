"""What a training of a language model is, and what is said of it after each epoch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import gpulayers as gl
from gpulayers.language._data import Text
from gpulayers.language._generate import generate
from gpulayers.language._model import gpt

OPTIMIZERS = "adamw", "muon"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a training is: the same settings and text give the same bits.

    context, width, layers, heads: of the model. epochs of ``steps`` batches of ``batch_size`` windows. lr: the highest
    learning rate, after a fifth of an epoch; it falls to a twentieth along a cosine. optimizer: "adamw", or "muon" for the
    matrices between embeddings and head, which then take steps as large as AdamW's; all else stays AdamW's.
    """

    context: int = 128
    width: int = 128
    layers: int = 4
    heads: int = 4
    epochs: int = 8
    steps: int = 80
    batch_size: int = 16
    lr: float = 3e-3
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0
    device: str = "cpu"
    precision: str | None = None
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            rule = " or ".join(OPTIMIZERS)
            raise ValueError(f"train text: optimizer: the rule is {rule}; got {self.optimizer!r}")
        for name in ("context", "width", "layers", "heads", "epochs", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"train text: {name}: the rule is an integer ≥ 1; got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"train text: the rule is heads that divide the width; got {self.heads} and {self.width}")

    def model(self) -> gl.Sequential:
        return gpt(context=self.context, width=self.width, layers=self.layers, heads=self.heads)

    @property
    def others(self) -> tuple[str, ...]:
        """How the names of those weights begin that are AdamW's in any case: tables of tokens and positions, the head."""
        return "0.", "1.", f"{2 * self.layers + 3}."

    def rate(self, step: int) -> float:
        """The learning rate of a step (from 0)."""
        total, rise = self.epochs * self.steps, max(1, self.steps // 5)
        fall = 0.05 + 0.475 * (1 + math.cos(math.pi * min(1.0, step / total)))
        return self.lr * fall * min(1.0, (step + 1) / rise)


Say = Callable[[str], Any]


class Reporter(gl.Callback):
    """After each epoch: what it reached, and how a text goes on by now. ``lines`` keeps it."""

    def __init__(self, text: Text, settings: Settings, say: Say = print):
        self.text, self.settings, self.say = text, settings, say
        self.lines: list[str] = []
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
