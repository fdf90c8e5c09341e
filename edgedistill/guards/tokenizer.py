"""tokenizer.json and tokenizer_config.json, before a runtime reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgedistill.errors import UserError
from edgedistill.guards.allowed import (
    REMEDY,
    Check,
    boolean,
    either,
    fields,
    integer,
    known_fields,
    number,
    one_of,
    text,
)
from edgedistill.strict import read_json, shown

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
MAX_BYTES = 128 << 20  # the largest of today has about 35 MB
MAX_CONFIG_BYTES = 16 << 20
MAX_TEMPLATE_BYTES = 1 << 20
MAX_DEPTH = 24
MAX_TOKEN = 1 << 24
MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")
PARTS = frozenset(
    [
        "version",
        "truncation",
        "padding",
        "added_tokens",
        "normalizer",
        "pre_tokenizer",
        "post_processor",
        "decoder",
        "model",
    ]
)

_word = text(r"(?s).{0,4096}", "a text of at most 4096 characters")
_template = text(rf"(?s).{{0,{MAX_TEMPLATE_BYTES}}}", "a template of at most a megabyte")
_token = fields(
    {
        "__type": one_of("AddedToken"),
        "content": _word,
        "id": integer(0, MAX_TOKEN),
        "lstrip": boolean,
        "normalized": boolean,
        "rstrip": boolean,
        "single_word": boolean,
        "special": boolean,
    },
    required=("content",),
)
_maybe_token = either(one_of(None), _token, _word)
# What transformers writes and onnxruntime's tokenizers read; nothing else is handed over.
CONFIG: dict[str, Check] = {
    "tokenizer_class": text(r"[A-Za-z0-9_]{1,80}", "the name of a tokenizer"),
    "model_max_length": number(0, 1e31),
    "chat_template": either(one_of(None), _template),
    **dict.fromkeys(
        ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "do_lower_case", "trim_offsets",
         "split_special_tokens", "spaces_between_special_tokens", "clean_up_tokenization_spaces"),
        either(one_of(None), boolean),
    ),
    **dict.fromkeys(
        ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"), _maybe_token
    ),
    **dict.fromkeys(("padding_side", "truncation_side"), one_of("left", "right")),
    "errors": one_of("replace", "strict", "ignore"),
}  # fmt: skip


def is_merge(one: Any) -> bool:
    """Two tokens: "a b", or ["a", "b"]."""
    return isinstance(one, str) or (
        isinstance(one, list) and len(one) == 2 and all(isinstance(token, str) for token in one)
    )


def check_tokenizer_json(path: Path) -> None:
    """A tokenizer with a vocabulary. Raises UserError for `{}` and whatever else is none.

    It holds the whole file as Python objects, about ten times its bytes: where the file is not trusted, call it in a
    process with bounds.
    """
    tree = read_json(path, what=TOKENIZER, max_bytes=MAX_BYTES, max_depth=MAX_DEPTH)
    unknown = sorted(set(tree) - PARTS)
    if unknown:
        raise UserError(f"{path} has the part {shown(unknown[0])}, which no tokenizer has", REMEDY)
    model = tree.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") not in MODELS:
        raise UserError(f"{path} holds no tokenizer: its model is none of {', '.join(MODELS)}", REMEDY)
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, (dict, list)) or not vocabulary:
        raise UserError(f"{path} holds no tokenizer: it has no vocabulary", REMEDY)
    ids = vocabulary.values() if isinstance(vocabulary, dict) else ()
    added = tree.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(one, dict) for one in added):
        raise UserError(f"{path}: added_tokens is {shown(added)}", REMEDY)
    merges = model.get("merges") or []
    if not isinstance(merges, list) or not all(is_merge(one) for one in merges):
        odd = next((one for one in merges if not is_merge(one)), merges) if isinstance(merges, list) else merges
        raise UserError(f"{path} has the merge {shown(odd)}, which is not a pair of tokens", REMEDY)
    for one in (*ids, *(token.get("id") for token in added)):
        if type(one) is not int or not 0 <= one < MAX_TOKEN:
            raise UserError(f"{path} has a token with the id {shown(one)}", REMEDY)
    if not all(isinstance(token.get("content"), str) for token in added):
        raise UserError(f"{path} has an added token without a text", REMEDY)


def rebuilt_tokenizer_config(path: Path) -> bytes:
    """tokenizer_config.json made of what is allowed in it. Raises UserError where it asks for code or is none."""
    tree = read_json(path, what=TOKENIZER_CONFIG, max_bytes=MAX_CONFIG_BYTES, max_depth=MAX_DEPTH)
    built: dict[str, Any] = known_fields(CONFIG)(tree, str(path))
    return json.dumps(built, sort_keys=True, allow_nan=False).encode()
