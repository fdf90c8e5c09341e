"""Which inputs a graph takes: what the model's signature asks for and its tokenizer or image processor gives.

An input that the model knows and nothing gives is refused by name, unless it is known to change nothing where it is
absent: a graph without it would compute something else in silence, and torch without it just the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from edgedistill.errors import UserError

IDS, MASK, TYPES, PIXELS = "input_ids", "attention_mask", "token_type_ids", "pixel_values"
# Of training, of a cache, how outputs are given, or what a model makes from its other inputs where it is absent.
ABSENT = frozenset({
    "labels", "next_sentence_label", "sentence_order_label", "entity_labels", "start_positions", "end_positions",
    "return_loss", "bool_masked_pos", "mask_time_indices", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict", "logits_to_keep", "interpolate_pos_encoding", "output_attention_mask",
    "deprecated_arguments", "return_dict_in_generate", "use_cache", "past_key_values", "cache_position", "cache",
    "mems", "use_mems", "perm_mask", "target_mapping", "input_mask", "position_ids", "head_mask",
    "cross_attn_head_mask", "inputs_embeds", "decoder_input_ids", "decoder_attention_mask", "decoder_position_ids",
    "decoder_head_mask", "decoder_inputs_embeds", "encoder_outputs", "encoder_hidden_states",
    "encoder_attention_mask", "num_hashes", "lengths", "sequence_id", "question_lengths", "question_positions",
})  # fmt: skip
# Inputs that are read only where the config says so: name → whether a model of this config reads it.
CONDITIONAL: Mapping[str, Callable[[Any], bool]] = {
    "langs": lambda config: int(getattr(config, "n_langs", 1)) > 1 and bool(getattr(config, "use_lang_emb", True)),
    "lang_ids": lambda config: getattr(config, "default_language", None) is None,
    "task_type_ids": lambda config: bool(getattr(config, "use_task_id", False)),
}
REMEDY = "export the module with this input among its examples: edgedistill.onnx.encoder.export_module takes any"


def text_inputs(model: Any, given: Collection[str] | None, where: str) -> list[str]:
    """The inputs of a text model, of those that its tokenizer gives; `given` None: it has none. UserError.

    What the tokenizer does not give is left out where the model takes zeros for it (a BERT with XLM-R's tokenizer).
    """
    known = _known(model)
    if model.main_input_name != IDS:
        raise UserError(
            f"{where} takes {model.main_input_name}, and text (input_ids) and image (pixel_values) models are exported",
            REMEDY,
        )
    names = [IDS, MASK]
    # One type is no choice: RoBERTa's table has one row, whatever its tokenizer gives.
    kinds = getattr(model.config, "type_vocab_size", None)
    several = kinds is None or int(kinds or 0) > 1
    if several and (TYPES in given if given is not None else True):
        names.append(TYPES)
    if given is not None:
        names += [name for name in given if name not in (*names, TYPES)]
    names = [name for name in names if name in known]
    _require_all(known - set(names) - {TYPES}, model, "text", where)
    return names


def require_image_inputs(model: Any, given: Collection[str], where: str) -> None:
    """UserError where an image model takes more than pixels, or its processor gives more that it takes."""
    known = _known(model)
    more = sorted((set(given) & known) - {PIXELS})
    if more:
        raise UserError(f"{where} takes {', '.join(more)} beside {PIXELS}, which is not exported", REMEDY)
    _require_all(known - {PIXELS, MASK}, model, "images", where)


def _known(model: Any) -> set[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {parameter.name for parameter in parameters if parameter.kind not in variable}


def _require_all(missing: Collection[str], model: Any, kind: str, where: str) -> None:
    lacking = sorted(
        name for name in missing if name not in ABSENT and CONDITIONAL.get(name, lambda _config: True)(model.config)
    )
    if lacking:
        raise UserError(
            f"{where} takes {', '.join(lacking)} beside {kind}, and no input of that name is made here: without it the"
            f" graph of {type(model).__name__} would compute something else",
            REMEDY,
        )
