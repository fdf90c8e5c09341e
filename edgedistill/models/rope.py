"""The rotary embedding of a config, as llama.cpp has it. Written by transformers 4 (`rope_theta`, `rope_scaling`) or 5.

A kind of scaling that llama.cpp does not have, or has not in the model's family, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from edgedistill.errors import UserError
from edgedistill.models.config import positive

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEFAULT_THETA = 10000.0
FULL_ATTENTION = "full_attention"
# llama.cpp's own constants of YaRN; a model that was trained with others would be run wrongly.
YARN_BETA_FAST = 32.0
YARN_BETA_SLOW = 1.0
FACTORS = "rope_freqs.weight"
LONG_FACTORS = "rope_factors_long.weight"
SHORT_FACTORS = "rope_factors_short.weight"
DECODER_KINDS = ("default", "linear", "llama3", "yarn")

MetadataValue = int | float | str | bool | list[bool]


class Sized(Protocol):
    """What of a model a rotary embedding depends on."""

    @property
    def head_dim(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


@dataclass(frozen=True)
class Rope:
    """Metadata keys (after `<arch>.rope.`) and `tensors`: name → what each frequency is divided by, one a pair.

    `notes`: where llama.cpp is known to differ.
    """

    metadata: dict[str, MetadataValue]
    tensors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def frequency_factors(self) -> NDArray[np.float32] | None:
        """[rotated / 2] of Llama 3's scaling, or None."""
        return self.tensors.get(FACTORS)


@dataclass(frozen=True)
class _Model:
    """What the kinds below read: the rope's own table and the model's sizes; `rotated` of a head's dimensions turn."""

    written: Mapping[str, Any]
    common: dict[str, MetadataValue]
    rotated: int
    positions: int
    original: Any
    where: str

    def number(self, key: str) -> float:
        return positive(self.written.get(key), key if key != "factor" else "rope factor", self.where)


def rope_of(
    config: Mapping[str, Any],
    shape: Sized,
    *,
    where: str,
    kinds: Sequence[str] = DECODER_KINDS,
    theta: float = DEFAULT_THETA,
    partial: float | None = None,
) -> Rope:
    """The rotary embedding of a config.

    `kinds`: what llama.cpp has in this family. `theta`, `partial`: what transformers takes where the config is silent;
    a share below 1 is refused where `partial` is None. Where each kind of layer has a table, full attention's is read.
    Raises UserError for a kind of scaling that llama.cpp would run differently.
    """
    written = _parameters(config, where)
    kind = written.get("rope_type", written.get("type", "default"))
    # Phi-3's first names for what is longrope today
    kind = "longrope" if "longrope" in kinds and kind in ("su", "yarn") else kind
    base = written.get("rope_theta", config.get("rope_theta"))
    share = written.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    share = (partial or 1.0) if share is None else share
    if partial is None and share != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is {share!r}", "models that rotate whole heads work")
    rotated = int(shape.head_dim * positive(share, "partial_rotary_factor", where))
    if rotated < 2 or rotated % 2 or rotated > shape.head_dim:
        raise UserError(
            f"{where}: partial_rotary_factor {share!r} of head_dim {shape.head_dim} rotates {rotated} dimensions",
            "rotary embeddings turn pairs: an even number of dimensions, at most head_dim",
        )
    if kind not in kinds:
        raise UserError(f"{where}: rope_type is {kind!r}", f"models with rope_type {', '.join(kinds)} work")
    common: dict[str, MetadataValue] = {
        "freq_base": positive(theta if base is None else base, "rope_theta", where),
        "dimension_count": rotated,
    }
    original = written.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    table = {
        "default": _plain,
        "linear": _linear,
        "llama3": _llama3,
        "yarn": _yarn,
        "longrope": _longrope,
    }
    return table[kind](_Model(written, common, rotated, shape.max_position_embeddings, original, where))


def _parameters(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, dict):
            value = value.get(FULL_ATTENTION, value)
        if not isinstance(value, dict):
            raise UserError(f"{where}: {key} is {value!r}", "it is a table with rope_type and its numbers")
        return value
    return {}


def _plain(model: _Model) -> Rope:
    return Rope(model.common)


def _linear(model: _Model) -> Rope:
    return Rope({**model.common, "scaling.type": "linear", "scaling.factor": model.number("factor")})


def _yarn(model: _Model) -> Rope:
    """YaRN (arXiv 2309.00071). llama.cpp computes the attention factor itself, as 1 + 0.1 ln(factor)."""
    factor = model.number("factor")
    usual: dict[str, Any] = {
        "beta_fast": YARN_BETA_FAST,
        "beta_slow": YARN_BETA_SLOW,
        "truncate": True,
        "attention_factor": 1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0,
        "mscale": None,
        "mscale_all_dim": None,
    }
    for key, value in usual.items():
        seen = model.written.get(key)
        same = seen == value or (
            isinstance(seen, int | float) and isinstance(value, float) and math.isclose(seen, value, rel_tol=1e-6)
        )
        if seen is not None and not same:
            raise UserError(
                f"{model.where}: yarn rope with {key} {seen!r}", f"yarn with {key} left out (or {value}) works"
            )
    return Rope(
        {
            **model.common,
            "scaling.type": "yarn",
            "scaling.factor": factor,
            "scaling.original_context_length": _original(model),
        }
    )


def _llama3(model: _Model) -> Rope:
    """Llama 3.1's scaling: long wavelengths slowed by `factor`, short ones kept, a ramp in between."""
    factor, low, high, original = (
        model.number(key)
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    if high <= low:
        raise UserError(
            f"{model.where}: high_freq_factor {high} is not above low_freq_factor {low}", "Llama 3.1 has 4.0 and 1.0"
        )
    theta = float(str(model.common["freq_base"]))
    import numpy as np  # plan reads families, and waits for no numpy

    pairs = np.arange(0, model.rotated, 2, dtype=np.float64) / model.rotated
    wavelengths = 2 * math.pi * theta**pairs
    kept_share = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    factors = 1.0 / ((1.0 - kept_share) / factor + kept_share)
    return Rope(model.common, {FACTORS: factors.astype(np.float32)})


def _longrope(model: _Model) -> Rope:
    """LongRoPE (arXiv 2402.13753): a factor for each pair, one set up to the original length and one beyond it."""
    import numpy as np

    tensors = {}
    for key, name in (("long_factor", LONG_FACTORS), ("short_factor", SHORT_FACTORS)):
        values = model.written.get(key)
        if not isinstance(values, list) or len(values) != model.rotated // 2:
            raise UserError(
                f"{model.where}: {key} of the rope is {str(values)[:80]}",
                f"it is a list of {model.rotated // 2} numbers",
            )
        tensors[name] = np.array([positive(v, key, model.where) for v in values], dtype=np.float32)
    original = _original(model)
    stretch = model.written.get("factor")
    stretch = model.positions / original if stretch is None else positive(stretch, "rope factor", model.where)
    usual = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    seen = model.written.get("attention_factor")
    attention = usual if seen is None else positive(seen, "attention_factor", model.where)
    return Rope(
        {**model.common, "scaling.attn_factor": attention, "scaling.original_context_length": original},
        tensors,
        [
            f"llama.cpp takes the long or the short rotary factors by the context that it is opened with, transformers"
            f" by the text: open it with more than {original} tokens of context only for texts that are longer"
        ],
    )


def _original(model: _Model) -> int:
    value = model.positions if model.original is None else model.original
    return int(positive(value, "original_max_position_embeddings", model.where))
