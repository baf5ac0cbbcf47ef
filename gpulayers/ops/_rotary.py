"""How fast each pair of a rotary embedding turns: the angles' frequencies, and the rules in use that stretch them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpulayers.definition import ArgumentError

KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def frequencies(
    dim: int, theta: float = 10000.0, scaling: Mapping[str, Any] | None = None, length: int | None = None
) -> tuple[np.ndarray, float]:
    """(radians from one position to the next of each of dim / 2 pairs, float64; what cos and sin are multiplied by).

    theta^(−2i / dim) for pair i (Su et al. 2021). scaling: as a model's config has it under ``rope_scaling``, its
    ``rope_type`` one of

    "linear": divided by ``factor`` (Chen et al. 2023, position interpolation);
    "dynamic": theta · (factor · n / m − factor + 1)^(dim / (dim − 2)), m = ``max_position_embeddings``, n the greater of m and
    ``length`` (NTK-aware, as in Code Llama's predecessors);
    "yarn": between the two, by how often a pair turns within ``original_max_position_embeddings``: ``beta_fast`` (32) times
    or more stays, ``beta_slow`` (1) or less is divided; cos and sin by 0.1 ln factor + 1 (Peng et al. 2023), or
    ``attention_factor``, or by ``mscale`` and ``mscale_all_dim``;
    "llama3": between wavelengths m / ``high_freq_factor``, up to which all stays, and m / ``low_freq_factor``, from which all
    is divided by ``factor``; m = ``original_max_position_embeddings`` (Llama 3.1);
    "longrope": divided pair by pair by ``short_factor``, or ``long_factor`` where ``length`` is more than
    ``original_max_position_embeddings``; cos and sin by √(1 + ln factor / ln m) (Ding et al. 2024).

    Raises ArgumentError for an unknown rule, for what it lacks, and for an odd ``dim``.
    """
    if dim < 2 or dim % 2:
        raise ArgumentError("dim", "an even number ≥ 2", dim)
    rule = _Rule(dict(scaling or {}))
    pairs = np.arange(0, dim, 2) / dim
    plain = theta**-pairs
    if rule.kind == "linear":
        return plain / rule["factor"], 1.0
    if rule.kind == "dynamic":
        most, factor = rule["max_position_embeddings"], rule["factor"]
        stretched = factor * max(most, length or 0) / most - (factor - 1)
        return (theta * stretched ** (dim / (dim - 2))) ** -pairs, 1.0
    if rule.kind == "yarn":
        return _yarn(plain, dim, theta, rule)
    if rule.kind == "llama3":
        return _llama3(plain, rule), 1.0
    if rule.kind == "longrope":
        return _longrope(plain, rule, length)
    return plain, 1.0


class _Rule(dict):
    """The numbers of a rule for scaling."""

    @property
    def kind(self) -> str:
        kind = self.get("rope_type", self.get("type", "default"))
        if kind not in KINDS:
            raise ArgumentError("scaling", f"a rope_type ∈ {{{', '.join(KINDS)}}}", repr(kind))
        return kind

    def __missing__(self, name: str) -> Any:
        raise ArgumentError("scaling", f"{name}, which {self.kind} needs", f"{', '.join(self)} alone")


def _stretch(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def _yarn(plain: np.ndarray, dim: int, theta: float, rule: _Rule) -> tuple[np.ndarray, float]:
    factor, most = rule["factor"], rule["original_max_position_embeddings"]

    def pair(turns: float) -> float:
        """The pair that turns so often within ``most`` positions."""
        return dim * math.log(most / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair(rule.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair(rule.get("beta_slow") or 1)), dim - 1)
    slow = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    found = plain / factor * slow + plain * (1 - slow)
    attention = rule.get("attention_factor")
    if attention is None:
        scale, every = rule.get("mscale"), rule.get("mscale_all_dim")
        attention = _stretch(factor, scale) / _stretch(factor, every) if scale and every else _stretch(factor)
    return found, float(attention)


def _llama3(plain: np.ndarray, rule: _Rule) -> np.ndarray:
    factor, low, high = rule["factor"], rule["low_freq_factor"], rule["high_freq_factor"]
    turns = rule["original_max_position_embeddings"] * plain / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain * kept + plain / factor * (1 - kept)


def _longrope(plain: np.ndarray, rule: _Rule, length: int | None) -> tuple[np.ndarray, float]:
    most = rule["original_max_position_embeddings"]
    by = np.asarray(rule["long_factor" if length is not None and length > most else "short_factor"], np.float64)
    if by.shape != plain.shape:
        raise ArgumentError("scaling", f"factors of shape [{len(plain)}], one for each pair", list(by.shape))
    attention = rule.get("attention_factor")
    if attention is None:
        factor = rule["factor"]
        attention = math.sqrt(1 + math.log(factor) / math.log(most)) if factor > 1 else 1.0
    return plain / by, float(attention)


def tables(frequency: np.ndarray, length: int, attention_factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin) of the positions 0 to length − 1, (length, pairs), float32; angles in float64."""
    angles = np.arange(length)[:, None] * np.asarray(frequency, np.float64)
    return tuple((f(angles) * attention_factor).astype(np.float32) for f in (np.cos, np.sin))  # type: ignore[return-value]
