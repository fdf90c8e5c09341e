"""A student cut out of its teacher: some of its layers, some of its widths, or both.

Which axis of a parameter means what stands in `axes`; a family whose parameters are all there can be cut.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch  # noqa: TID253  this module is imported by training alone
from torch import Tensor, nn  # noqa: TID253

from edgedistill.errors import UserError
from edgedistill.student.axes import (
    DOWN,
    HEAD_NORMS,
    NORMS,
    OUTPUT,
    OWN_NAMES,
    UNCUT,
    Sizes,
    axes_of,
    axis_sizes,
    config_of,
    layer_number,
    names_of,
    norm_kind,
    parts_of,
    require_known,
    sizes_of,
)
from edgedistill.student.importance import Importance, Norm, body, layer_damage, measure


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

    Importance is the rise of the loss on the sample when the layer alone is skipped. In a family with layers without
    rotary embeddings these stay in their places.
    """
    kept = _wished_layers(model, count, choice, sample)
    rotary = getattr(model.config, "no_rope_layers", None)
    return kept if not rotary else _in_rotation(kept, rotary)


def _in_rotation(kept: list[int], rotary: Sequence[int]) -> list[int]:
    """The layers nearest to `kept` that have a rotary embedding, or none, where the family's pattern wants it.

    SmolLM 3: every fourth layer has none, in the student as in the teacher; llama.cpp runs no other pattern.
    """
    cost: dict[int, tuple[int, list[int]]] = {-1: (0, [])}
    for place, wish in enumerate(kept):
        longer: dict[int, tuple[int, list[int]]] = {}
        for layer, kind in enumerate(rotary):
            before = [found for last, found in cost.items() if last < layer]
            if kind == rotary[place] and before:
                least, chosen = min(before)
                longer[layer] = (least + abs(layer - wish), [*chosen, layer])
        cost = longer
    return min(cost.values())[1]


def _wished_layers(model: nn.Module, count: int, choice: str, sample: Tensor | None) -> list[int]:
    total = sizes_of(model.config).layers
    even = uniform_layers(total, count)  # refuses a count that is out of range
    if choice == "uniform" or count == total:
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
    is cut). Norms are scaled by what the mean square loses or gains with the channels that go: where those are silent
    the student computes what its teacher does, but for the norms' eps, and LayerNorm's mean where it is not zero.
    Raises UserError for a family that the tables do not cover and for sizes that cannot be cut.
    """
    have = sizes_of(model.config)
    _require_cuttable(model, have, wanted)
    # Layers first: what the rest is measured on is then what will be there.
    kept_layers = chosen_layers(model, wanted.layers, layer_choice, sample)
    kept: dict[str, Any] = {"layers": kept_layers, "layer_choice": layer_choice}
    if len(kept_layers) < have.layers:
        model = _build(model, model.state_dict(), have, {}, kept_layers)
    else:
        model = copy.deepcopy(model).float()
    if (wanted.hidden, wanted.ffn, wanted.heads, wanted.kv_heads) == (have.hidden, have.ffn, have.heads, have.kv_heads):
        return model, kept
    sample = _required(sample)
    found = _measured(model.eval(), have, sample)
    indices: dict[int, dict[str, Tensor]] = {-1: {"hidden": _top(_known(found.hidden), wanted.hidden)}}
    for layer in range(wanted.layers):
        groups, queries = _kept_heads(found.heads[layer], have, wanted)
        indices[layer] = {
            **indices[-1],
            "ffn": _top(found.ffn[layer], wanted.ffn),
            "q": _spread(queries, have.head_dim),
            "kv": _spread(groups, have.head_dim),
        }
    student = _build(model, _rescaled(model, found, indices), have, indices, list(range(wanted.layers)), wanted)
    _match_entry(student, model, indices[-1]["hidden"], sample)
    kept |= {
        "method": "activation importance",
        "sample_tokens": int(sample.numel()),
        "hidden": wanted.hidden,
        "ffn": wanted.ffn,
        "heads": wanted.heads,
        "key_value_heads": wanted.kv_heads,
    }
    return student, kept


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The stack of layers."""
    inner = body(model)
    for name in ("layers", "h"):
        found = getattr(inner, name, None)
        if isinstance(found, nn.ModuleList):
            return found
    raise UserError(f"{type(model).__name__} has no list of layers", UNCUT)


def _measured(model: nn.Module, have: Sizes, sample: Tensor) -> Importance:
    modules = dict(model.named_modules())

    def by_layer(ends: tuple[str, ...]) -> dict[int, str]:
        return {layer_number(name): name for name in modules if name.endswith(ends) and layer_number(name) >= 0}

    norms = {name: Norm("hidden", norm_kind(name, modules[name], have.hidden)) for name in _stream_norms(model)}
    for name, module in modules.items():
        over = HEAD_NORMS.get(name.rpartition(".")[2])
        width = 0 if over is None else axis_sizes(have)[over]
        if over is not None and module.weight.numel() == width != have.head_dim:
            norms[name] = Norm(over, norm_kind(name, module, width))
    return measure(model, sample, norms=norms, down=by_layer(DOWN), output=by_layer(OUTPUT), heads=have.heads)


def _stream_norms(model: nn.Module) -> list[str]:
    """Names of the norms over the residual stream."""
    return [name for name, _ in model.named_modules() if name.endswith(NORMS)]


def _rescaled(model: nn.Module, found: Importance, indices: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights, those of norms scaled by what the mean square loses: RMS over the kept channels is not that over
    all, and the kept ones are the louder."""
    state = dict(model.state_dict())
    for name, norm in found.norms.items():
        squares, kept = found.squares[name], indices[layer_number(name)][norm.over]
        whole = float(squares.mean())
        if len(kept) == len(squares) or whole == 0.0:
            continue
        if not norm.kind.weighted:
            raise UserError(
                f"a {config_of(model).model_type} teacher's hidden size cannot be cut: its norms have no weights that"
                " could make up for the channels that are removed",
                "use student.start=layers, or fresh",
            )
        ratio = (float(squares[kept].mean()) / whole) ** 0.5
        weight, one = state[f"{name}.weight"].float(), float(norm.kind.plus_one)
        state[f"{name}.weight"] = (weight + one) * ratio - one
    return state


def _build(
    model: nn.Module,
    state: Mapping[str, Tensor],
    have: Sizes,
    indices: Mapping[int, Mapping[str, Tensor]],
    layers: list[int],
    wanted: Sizes | None = None,
) -> nn.Module:
    """A model from the layers (old numbers, in new order) and, where `wanted` is given, the indices that are kept."""
    kind = config_of(model).model_type
    try:
        student: Any = type(model)(_config(model, have, layers, wanted)).float()
    except ValueError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"transformers cannot make a {kind} of the sizes asked for: {reason}",
            "ask for other sizes in student.shape, usually heads that divide the hidden size",
        ) from error
    place = {old: new for new, old in enumerate(layers)}
    expected = student.state_dict()
    made = {}
    for name, tensor in state.items():
        number = layer_number(name)
        if number >= 0 and number not in place:
            continue
        new = name if number < 0 else _renumbered(name, number, place[number])
        made[new] = _sliced(name, tensor.float(), indices[number], have) if wanted is not None else tensor.float()
        if made[new].shape != expected[new].shape:
            raise UserError(
                f"a {kind} of the sizes asked for has {new} {list(expected[new].shape)}, and the cut gives"
                f" {list(made[new].shape)}",
                "ask for heads · head size = hidden size in student.shape, which this family needs",
            )
    student.load_state_dict(made)
    student.tie_weights()
    return student.eval()  # type: ignore[no-any-return]


def _config(model: nn.Module, have: Sizes, layers: list[int], wanted: Sizes | None) -> Any:
    """The teacher's configuration with the new sizes, in its own words. Raises ValueError for what is impossible."""
    config = copy.deepcopy(config_of(model))
    names = names_of(config)
    changes = {"num_layers": len(layers)}
    if wanted is not None:
        changes |= {
            "hidden_size": wanted.hidden, "intermediate_size": wanted.ffn, "num_attention_heads": wanted.heads,
            "num_key_value_heads": wanted.kv_heads,
        }  # fmt: skip
    for what, value in changes.items():
        own = names.get(what, OWN_NAMES[what])
        if hasattr(config, own):
            setattr(config, own, value)
    if wanted is not None:
        if hasattr(config, "n_inner"):
            config.n_inner = wanted.ffn
        if wanted.heads * have.head_dim != wanted.hidden or hasattr(config, "head_dim"):
            config.head_dim = have.head_dim
    # what a family says layer by layer: kinds of attention, rotary or not
    for key, value in list(vars(config).items()):
        if "layer" in key and isinstance(value, list) and len(value) == have.layers:
            setattr(config, key, [value[layer] for layer in layers])
    _validate(config)
    return config


def _validate(config: Any) -> None:
    """transformers checks a configuration only where it is made or loaded. ValueError, as from there."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        config.validate()
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error


def _sliced(name: str, tensor: Tensor, index: Mapping[str, Tensor], have: Sizes) -> Tensor:
    axes, lengths = axes_of(name), axis_sizes(have)
    assert axes is not None
    for axis, meaning in enumerate(axes):
        if meaning is None or meaning == "vocab":
            continue
        parts, start = [], 0
        for part in parts_of(meaning, tensor.shape[axis], have):
            parts.append(index[part] + start)
            start += lengths[part]
        if parts:
            tensor = tensor.index_select(axis, torch.cat(parts))
    return tensor.contiguous()


def _match_entry(student: Any, teacher: Any, hidden: Tensor, sample: Tensor) -> None:
    """Make the kept channels enter the first layer as they do in the teacher, whatever the family does to embeddings.

    Gemma multiplies them by the root of the hidden size, which the cut has changed. A tied head changes with the
    embedding, and the final norm takes that back.
    """
    ids = sample[:1]
    wanted, found = _entering(teacher, ids)[..., hidden], _entering(student, ids)
    scale = float((found * wanted).sum() / wanted.square().sum())
    if torch.allclose(found, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max())):
        return
    embedding, head = student.get_input_embeddings().weight, student.get_output_embeddings().weight
    embedding /= scale
    if head is embedding:
        for name in _stream_norms(student):
            if layer_number(name) < 0:
                final = student.get_submodule(name)
                one = float(norm_kind(name, final, len(hidden)).plus_one)
                final.weight.copy_((final.weight + one) * scale - one)
                if getattr(final, "bias", None) is not None:
                    final.bias *= scale
    if not torch.allclose(_entering(student, ids), wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max())):
        raise UserError(
            f"a {config_of(teacher).model_type} teacher's hidden size cannot be cut: what it does to its embedding is"
            " not known",
            "use student.start=layers, or fresh",
        )


def _entering(model: nn.Module, ids: Tensor) -> Tensor:
    """What enters the first layer [S, T, H] for ids [S, T]."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(arguments[0] if arguments else named["hidden_states"])

    handle = layers_of(model)[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        body(model)(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def _kept_heads(importance: Tensor, have: Sizes, wanted: Sizes) -> tuple[Tensor, Tensor]:
    """Key/value and query heads that stay, ascending: the groups that matter most, in each the queries that do."""
    group, keep = have.heads // have.kv_heads, wanted.heads // wanted.kv_heads
    by_group = importance.view(have.kv_heads, group)
    in_group = torch.stack([_top(row, keep) for row in by_group])
    strength = by_group.gather(1, in_group).sum(1)
    groups = _top(strength, wanted.kv_heads)
    return groups, torch.cat([in_group[g] + int(g) * group for g in groups])


def _require_cuttable(model: nn.Module, have: Sizes, wanted: Sizes) -> None:
    config = config_of(model)
    require_known(model, have)
    for what in ("hidden", "ffn", "layers", "heads", "kv_heads"):
        if not 1 <= getattr(wanted, what) <= getattr(have, what):
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
    if wanted.layers < have.layers and getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UserError(
            f"a {config.model_type} teacher's layers cannot be cut: it scales attention by the layer's number",
            "use student.start=width, or fresh",
        )


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
