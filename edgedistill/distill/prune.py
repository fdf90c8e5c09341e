"""A student cut out of its teacher: some of its layers, some of its widths, or both.

What is cut is decided by tables: which axis of a parameter means what, by the end of its name. A family whose
parameters are all in the table can be cut.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch  # noqa: TID253  this module is imported by training alone
from torch import Tensor, nn  # noqa: TID253

from edgedistill.distill.importance import Importance, body, layer_damage, measure
from edgedistill.errors import UserError

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
NORMS = ("layernorm", "model.norm", "ln_1", "ln_2", "ln_f")
DOWN, OUTPUT = ("mlp.down_proj", "mlp.c_proj"), ("self_attn.o_proj", "attn.c_proj")
# Sizes of configurations that optimum's table does not know: model_type -> the normalised name -> its own.
OWN_NAMES: dict[str, dict[str, str]] = {}
FALLBACK_NAMES = {
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
    """A transformers configuration's sizes, by optimum's normalised names, else our own table."""
    names = _names(config)

    def read(what: str, otherwise: int | None = None) -> int:
        value = getattr(config, names.get(what, FALLBACK_NAMES[what]), None)
        value = otherwise if value is None else value
        if not isinstance(value, int):
            raise UserError(
                f"a {config.model_type} model does not say its {what}", "use student.start=fresh, or pretrained"
            )
        return value

    hidden, heads = read("hidden_size"), read("num_attention_heads")
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    ffn = getattr(config, names.get("intermediate_size", "intermediate_size"), None) or getattr(config, "n_inner", None)
    return Sizes(
        hidden=hidden, ffn=int(ffn or 4 * hidden), layers=read("num_layers"), heads=heads,
        kv_heads=read("num_key_value_heads", heads), head_dim=int(head_dim), vocab=read("vocab_size"),
    )  # fmt: skip


def uniform_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """Numbers of the teacher's layers that a student takes: evenly spread, first and last kept.

    Jiao et al. 2020 (TinyBERT): the uniform map beats taking the top or the bottom layers.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise UserError(
            f"a student of {student_layers} layers cannot be cut from a teacher of {teacher_layers}",
            f"set student.shape.num_hidden_layers to 1…{teacher_layers}",
        )
    if student_layers == 1:
        return [0]
    return [round(i * (teacher_layers - 1) / (student_layers - 1)) for i in range(student_layers)]


def chosen_layers(model: nn.Module, count: int, choice: str, sample: Tensor | None) -> list[int]:
    """Which layers a student of `count` keeps, ascending: "uniform", "first", "last", or "importance".

    Importance is the rise of the loss on the sample when the layer alone is skipped.
    """
    total = sizes_of(model.config).layers
    even = uniform_layers(total, count)  # refuses a count that is out of range
    if choice == "uniform":
        return even
    if choice == "first":
        return list(range(count))
    if choice == "last":
        return list(range(total - count, total))
    damage = layer_damage(model, _required(sample), layers_of(model))
    return sorted(sorted(range(total), key=lambda layer: (-damage[layer], layer))[:count])


@torch.no_grad()
def cut(
    model: nn.Module, wanted: Sizes, *, layer_choice: str = "uniform", sample: Tensor | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """A student of the sizes `wanted` with the weights of the teacher that matter most, fp32, and what was kept.

    Layers go first, widths are then measured on what is left, on the sample's [S, T] tokens (not needed where no width
    is cut). Raises UserError for a family that the table does not cover and for sizes that cannot be cut.
    """
    have = sizes_of(model.config)
    _require_cuttable(model, have, wanted)
    # Layers first: what the rest is measured on is then what will be there.
    kept_layers = chosen_layers(model, wanted.layers, layer_choice, sample)
    if len(kept_layers) < have.layers:
        model = _build(model, model.state_dict(), have, wanted, {}, kept_layers)
    kept: dict[str, Any] = {"layers": kept_layers, "layer_choice": layer_choice}
    if (wanted.hidden, wanted.ffn, wanted.heads, wanted.kv_heads) == (have.hidden, have.ffn, have.heads, have.kv_heads):
        return model.float(), kept
    found = _measured(model, have, _required(sample))
    hidden = _top(_known(found.hidden), wanted.hidden)
    indices: dict[int, dict[str, Tensor]] = {}
    for layer in range(wanted.layers):
        groups, queries = _kept_heads(found.heads[layer], have, wanted)
        indices[layer] = {
            "hidden": hidden,
            "ffn": _top(found.ffn[layer], wanted.ffn),
            "q": _spread(queries, have.head_dim),
            "kv": _spread(groups, have.head_dim),
        }
    state = _rescaled(model, found, hidden)
    student = _build(model, state, have, wanted, indices, list(range(wanted.layers)), hidden)
    kept |= {
        "method": "activation importance",
        "sample_tokens": int(_required(sample).numel()),
        "hidden": wanted.hidden,
        "ffn": wanted.ffn,
        "heads": wanted.heads,
        "key_value_heads": wanted.kv_heads,
    }
    return student.float(), kept


def config_of(model: nn.Module) -> Any:
    """Its transformers configuration."""
    return model.config


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The stack of layers."""
    inner = body(model)
    for name in ("layers", "h"):
        found = getattr(inner, name, None)
        if isinstance(found, nn.ModuleList):
            return found
    raise UserError(f"{type(model).__name__} has no list of layers", "use student.start=fresh, or pretrained")


def axes_of(name: str) -> tuple[str | None, ...] | None:
    """What the axes of a parameter mean; None where the table does not know it."""
    for end, axes in AXES.items():
        if name == end or name.endswith(f".{end}") or (end.startswith("layernorm") and name.endswith(end)):
            return axes
    return None


def _measured(model: nn.Module, have: Sizes, sample: Tensor) -> Importance:
    names = [name for name, _ in model.named_modules()]

    def by_layer(ends: tuple[str, ...]) -> dict[int, str]:
        return {_layer_number(name): name for name in names if name.endswith(ends) and _layer_number(name) >= 0}

    return measure(
        model.eval(),
        sample,
        norms=[name for name in names if name.endswith(NORMS)],
        down=by_layer(DOWN),
        output=by_layer(OUTPUT),
        heads=have.heads,
    )


def _rescaled(model: nn.Module, found: Importance, hidden: Tensor) -> dict[str, Tensor]:
    """The weights, those of RMS norms scaled by what the mean square loses: RMS over the kept channels is not that over
    all, and the kept ones are the louder."""
    state = dict(model.state_dict())
    for name, squares in found.squares.items():
        module = dict(model.named_modules())[name]
        if getattr(module, "bias", None) is not None:  # LayerNorm also takes the mean away: left as it is
            continue
        weight = state[f"{name}.weight"]
        ratio = float((squares[hidden].mean() / squares.mean()).sqrt())
        # Gemma's norms multiply by 1 + weight
        plus_one = "Gemma" in type(module).__name__
        state[f"{name}.weight"] = (weight.float() + 1) * ratio - 1 if plus_one else weight.float() * ratio
    return state


def _build(
    model: nn.Module,
    state: Mapping[str, Tensor],
    have: Sizes,
    wanted: Sizes,
    indices: Mapping[int, Mapping[str, Tensor]],
    layers: list[int],
    hidden: Tensor | None = None,
) -> nn.Module:
    """A model of the new sizes from the rows and columns that are kept; `layers` are the old numbers, in new order."""
    config = copy.deepcopy(config_of(model))
    names = _names(config)
    changes = {
        "num_layers": len(layers),
        **({} if hidden is None else {
            "hidden_size": wanted.hidden, "intermediate_size": wanted.ffn, "num_attention_heads": wanted.heads,
            "num_key_value_heads": wanted.kv_heads,
        }),
    }  # fmt: skip
    for what, value in changes.items():
        own = names.get(what, FALLBACK_NAMES[what])
        if hasattr(config, own):
            setattr(config, own, value)
    if hidden is not None:
        if getattr(config, "n_inner", None) is not None or config.model_type == "gpt2":
            config.n_inner = wanted.ffn
        if config.model_type != "gpt2":
            config.head_dim = have.head_dim
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    student = type(model)(config).float()
    place = {old: new for new, old in enumerate(layers)}
    made = {}
    for name, tensor in state.items():
        number = _layer_number(name)
        if number >= 0 and number not in place:
            continue
        index = indices.get(number, {"hidden": hidden} if hidden is not None else {})
        new = name if number < 0 else _renumbered(name, number, place[number])
        made[new] = _sliced(name, tensor, index, have) if hidden is not None else tensor.float()
    student.load_state_dict(made)
    student.tie_weights()  # type: ignore[operator]
    return student


def _sliced(name: str, tensor: Tensor, index: Mapping[str, Tensor], have: Sizes) -> Tensor:
    axes = axes_of(name)
    assert axes is not None
    sizes = {"q": have.heads * have.head_dim, "kv": have.kv_heads * have.head_dim, "ffn": have.ffn}
    out = tensor.float()
    for axis, meaning in enumerate(axes):
        if meaning is None or meaning == "vocab":
            continue
        if meaning.endswith(" or head"):
            meaning = meaning.split(" ")[0]
            if out.shape[axis] == have.head_dim:  # a norm of each head, or (OLMo 2) one over all of them
                continue
        if meaning == "hidden":
            out = out.index_select(axis, index["hidden"])
            continue
        parts, start = [], 0
        for part in meaning.split("+"):
            parts.append(index[part] + start)
            start += sizes[part]
        out = out.index_select(axis, torch.cat(parts))
    return out.contiguous()


def _kept_heads(importance: Tensor, have: Sizes, wanted: Sizes) -> tuple[Tensor, Tensor]:
    """Key/value and query heads that stay, ascending: the groups that matter most, in each the queries that do."""
    group, keep = have.heads // have.kv_heads, wanted.heads // wanted.kv_heads
    by_group = importance.view(have.kv_heads, group)
    in_group = torch.stack([_top(row, keep) for row in by_group])
    strength = by_group.gather(1, in_group).sum(1)
    groups = _top(strength, wanted.kv_heads)
    return groups, torch.cat([in_group[g] + int(g) * group for g in groups])


def _require_cuttable(model: nn.Module, have: Sizes, wanted: Sizes) -> None:
    kind = config_of(model).model_type
    unknown = [name for name in model.state_dict() if axes_of(name) is None]
    if unknown:
        raise UserError(
            f"a {kind} teacher cannot be cut: what the axes of {unknown[0]} mean is not known",
            "use student.start=fresh, or pretrained",
        )
    for what in ("hidden", "ffn", "layers", "heads", "kv_heads"):
        if getattr(wanted, what) > getattr(have, what):
            raise UserError(
                f"a student with {what} {getattr(wanted, what)} cannot be cut from a teacher's {getattr(have, what)}",
                "ask for smaller sizes in student.shape, or use student.start=fresh",
            )
    if wanted.head_dim != have.head_dim or wanted.vocab != have.vocab:
        what = "head_dim" if wanted.head_dim != have.head_dim else "vocab"
        raise UserError(
            f"a student with {what} {getattr(wanted, what)} cannot be cut from a teacher's {getattr(have, what)}",
            "leave student.shape.head_dim open, or use student.start=fresh",
        )
    if wanted.heads % wanted.kv_heads or wanted.heads // wanted.kv_heads > have.heads // have.kv_heads:
        raise UserError(
            f"{wanted.heads} query heads over {wanted.kv_heads} key/value heads cannot be cut from {have.heads} over"
            f" {have.kv_heads}: a group may only lose queries",
            f"ask for at most {have.heads // have.kv_heads} query heads a key/value head in student.shape",
        )
    if kind == "gpt2" and wanted.heads * wanted.head_dim != wanted.hidden:
        raise UserError(
            f"a gpt2 of width {wanted.hidden} needs {wanted.hidden // wanted.head_dim} heads, not {wanted.heads}",
            "ask for heads · head size = hidden size",
        )


def _names(config: Any) -> dict[str, str]:
    """Normalised name → the configuration's own, by optimum, else by our table."""
    own = OWN_NAMES.get(config.model_type)
    if own is not None:
        return own
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


def _layer_number(name: str) -> int:
    parts = name.split(".")
    for before, number in itertools.pairwise(parts):
        if before in ("layers", "h") and number.isdigit():
            return int(number)
    return -1


def _renumbered(name: str, old: int, new: int) -> str:
    for stack in ("layers", "h"):
        name = name.replace(f".{stack}.{old}.", f".{stack}.{new}.", 1)
    return name


def _top(values: Tensor, count: int) -> Tensor:
    """Indices of the largest values, ascending; the earlier of two equal ones."""
    order = torch.sort(values, descending=True, stable=True).indices[:count]
    return order.sort().values


def _spread(heads: Tensor, width: int) -> Tensor:
    return (heads.unsqueeze(1) * width + torch.arange(width)).flatten()


def _known(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _required(sample: Tensor | None) -> Tensor:
    if sample is None:
        raise ValueError("importance is measured on text: a sample is needed")
    return sample
