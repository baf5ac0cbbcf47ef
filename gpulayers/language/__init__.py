"""Small language models, over bytes: trained, tried, continued. ``gpulayers train text`` and ``gpulayers generate``."""

from gpulayers.language._data import Text, read
from gpulayers.language._generate import generate
from gpulayers.language._model import NextTokenLoss, PositionEmbedding, context_of, gpt
from gpulayers.language._report import OPTIMIZERS, Settings, bits
from gpulayers.language._train import train

__all__ = [
    "OPTIMIZERS",
    "NextTokenLoss",
    "PositionEmbedding",
    "Settings",
    "Text",
    "bits",
    "context_of",
    "generate",
    "gpt",
    "read",
    "train",
]
