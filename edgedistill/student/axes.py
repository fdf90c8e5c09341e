"""What the axes of a decoder's parameters mean, and what its norms do: all that a cut has to know of a family.

A family can be cut where every parameter is in the table and every norm is one of the kinds below.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch  # noqa: TID253  this module is imported by training alone
from torch import nn  # noqa: TID253

from edgedistill.errors import UserError

UNCUT = "use student.start=fresh, or pretrained"

# End of a parameter's name -> what its axes are. "q" is heads · head size, "kv" key/value heads · head size, joined
# by "+" where a matrix holds several; None: an axis that is never cut.
AXES: dict[str, tuple[str | None, ...]] = {
    "embed_tokens.weight": ("vocab", "hidden"),
    "lm_head.weight": ("vocab", "hidden"),
    "lm_head.bias": ("vocab",),
    "q_proj.weight": ("q", "hidden"),
    "q_proj.bias": ("q",),
    "k_proj.weight": ("kv", "hidden"),
    "k_proj.bias": ("kv",),
    "v_proj.weight": ("kv", "hidden"),
    "v_proj.bias": ("kv",),
    "qkv_proj.weight": ("q+kv+kv", "hidden"),
    "o_proj.weight": ("hidden", "q"),
    "o_proj.bias": ("hidden",),
    "gate_proj.weight": ("ffn", "hidden"),
    "gate_proj.bias": ("ffn",),
    "up_proj.weight": ("ffn", "hidden"),
    "up_proj.bias": ("ffn",),
    "gate_up_proj.weight": ("ffn+ffn", "hidden"),
    "down_proj.weight": ("hidden", "ffn"),
    "down_proj.bias": ("hidden",),
    "q_norm.weight": ("q or head",),
    "k_norm.weight": ("kv or head",),
    "layernorm.weight": ("hidden",),
    "layernorm.bias": ("hidden",),
    "model.norm.weight": ("hidden",),
    "model.norm.bias": ("hidden",),
    # GPT-2: its Conv1D keeps matrices transposed
    "wte.weight": ("vocab", "hidden"),
    "wpe.weight": (None, "hidden"),
    "attn.c_attn.weight": ("hidden", "q+q+q"),
    "attn.c_attn.bias": ("q+q+q",),
    "attn.c_proj.weight": ("q", "hidden"),
    "attn.c_proj.bias": ("hidden",),
    "mlp.c_fc.weight": ("hidden", "ffn"),
    "mlp.c_fc.bias": ("ffn",),
    "mlp.c_proj.weight": ("ffn", "hidden"),
    "mlp.c_proj.bias": ("hidden",),
    "ln_1.weight": ("hidden",),
    "ln_1.bias": ("hidden",),
    "ln_2.weight": ("hidden",),
    "ln_2.bias": ("hidden",),
    "ln_f.weight": ("hidden",),
    "ln_f.bias": ("hidden",),
}
# Modules: norms over the residual stream, norms over all heads, and what takes neurons and heads.
NORMS, HEAD_NORMS = ("layernorm", "model.norm", "ln_1", "ln_2", "ln_f"), {"q_norm": "q", "k_norm": "kv"}
DOWN, OUTPUT = ("mlp.down_proj", "mlp.c_proj"), ("self_attn.o_proj", "attn.c_proj")
# What most families call their sizes, where optimum does not know one.
OWN_NAMES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
}


@dataclass(frozen=True)
class Sizes:
    """Of a decoder, whatever its family calls them."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


def sizes_of(config: Any) -> Sizes:
    """A transformers configuration's sizes, by optimum's normalised names, else the usual ones."""
    names = names_of(config)

    def read(what: str, otherwise: int | None = None) -> int:
        value = getattr(config, names.get(what, OWN_NAMES[what]), None)
        value = otherwise if value is None else value
        if not isinstance(value, int):
            raise UserError(f"a {config.model_type} model does not say its {what}", UNCUT)
        return value

    hidden, heads = read("hidden_size"), read("num_attention_heads")
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    ffn = getattr(config, names.get("intermediate_size", "intermediate_size"), None) or getattr(config, "n_inner", None)
    return Sizes(
        hidden=hidden, ffn=int(ffn or 4 * hidden), layers=read("num_layers"), heads=heads,
        kv_heads=read("num_key_value_heads", heads), head_dim=int(head_dim), vocab=read("vocab_size"),
    )  # fmt: skip


@dataclass(frozen=True)
class NormKind:
    """A norm's arithmetic: `centered` takes the mean away (LayerNorm), `plus_one` multiplies by 1 + weight (Gemma)."""

    centered: bool
    plus_one: bool
    weighted: bool


@torch.no_grad()
def norm_kind(name: str, module: Any, width: int) -> NormKind:
    """Which kind a norm over `width` channels is, found by running it, since class names do not tell.

    Raises UserError where it is none that the cut knows how to rescale.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    # far from unit scale and zero mean, so that eps does not count and a mean that is taken away shows
    x = 100 * (torch.randn(4, width, generator=torch.Generator().manual_seed(0)) + 1)
    given = module(x).float()
    for centered, plus_one in itertools.product((False, True), repeat=2):
        z = x - x.mean(-1, keepdim=True) if centered else x
        z = z / z.square().mean(-1, keepdim=True).sqrt()
        z = z if weight is None else z * (weight.float() + plus_one)
        if torch.allclose(given, z if bias is None else z + bias.float(), rtol=1e-3, atol=1e-3):
            return NormKind(centered, plus_one, weight is not None)
    raise UserError(
        f"the teacher cannot be cut: what its norm {name} ({type(module).__name__}) does is not known", UNCUT
    )


def axes_of(name: str) -> tuple[str | None, ...] | None:
    """What the axes of a parameter mean; None where the table does not know it."""
    for end, axes in AXES.items():
        if name == end or name.endswith(f".{end}") or (end.startswith("layernorm") and name.endswith(end)):
            return axes
    return None


def parts_of(meaning: str, length: int, sizes: Sizes) -> list[str]:
    """The parts that lie one after the other on an axis of `length`; empty where none of them is ever cut."""
    if meaning.endswith(" or head"):  # a norm of each head, or (OLMo 2) one over all of them
        meaning = meaning.removesuffix(" or head")
        return [] if length == sizes.head_dim else [meaning]
    return meaning.split("+")


def require_known(model: nn.Module, sizes: Sizes) -> None:
    """Refuse a model with a parameter that the table does not know, or whose axes are not of the sizes it says."""
    kind = config_of(model).model_type
    for name, tensor in model.state_dict().items():
        axes = axes_of(name)
        known = axes is not None and len(axes) == tensor.ndim and all(
            meaning is None or length == _length(meaning, length, sizes)
            for meaning, length in zip(axes, tensor.shape, strict=True)
        )  # fmt: skip
        if not known:
            raise UserError(
                f"a {kind} teacher cannot be cut: what the axes of {name} {list(tensor.shape)} mean is not known", UNCUT
            )


def config_of(model: nn.Module) -> Any:
    """Its transformers configuration."""
    return model.config


def layer_number(name: str) -> int:
    """The layer that a parameter or module belongs to; -1: none."""
    parts = name.split(".")
    for before, number in itertools.pairwise(parts):
        if before in ("layers", "h") and number.isdigit():
            return int(number)
    return -1


def _length(meaning: str, length: int, sizes: Sizes) -> int:
    return sum(axis_sizes(sizes)[part] for part in parts_of(meaning, length, sizes)) or length


def axis_sizes(sizes: Sizes) -> dict[str, int]:
    """Length of each kind of axis."""
    return {
        "hidden": sizes.hidden,
        "ffn": sizes.ffn,
        "q": sizes.heads * sizes.head_dim,
        "kv": sizes.kv_heads * sizes.head_dim,
        "vocab": sizes.vocab,
    }


def names_of(config: Any) -> dict[str, str]:
    """Normalised name → the configuration's own, by optimum; empty where it does not know the family."""
    try:
        from optimum.utils import NormalizedConfigManager

        kind = NormalizedConfigManager.get_normalized_config_class(config.model_type)
        kind = getattr(kind, "func", kind)
    except (ImportError, KeyError):
        return {}
    read = {
        "hidden_size": "HIDDEN_SIZE", "num_layers": "NUM_LAYERS", "num_attention_heads": "NUM_ATTENTION_HEADS",
        "num_key_value_heads": "NUM_KEY_VALUE_HEADS", "vocab_size": "VOCAB_SIZE",
    }  # fmt: skip
    return {
        ours: str(getattr(kind, theirs)) for ours, theirs in read.items() if isinstance(getattr(kind, theirs, 0), str)
    }
