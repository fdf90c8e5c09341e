"""The files of a Hugging Face tokenizer, and the parts that every kind of tokenizer has in a GGUF.

Token list and types, special tokens, what is put around a text, the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.errors import UserError
from edgedistill.gguf.pretokenizers import OWN_CONVERTER
from edgedistill.models.generation import DEFAULT_TEMPLATE, chat_templates
from edgedistill.models.hf_tokenizer import BYTES, no_tokenizer_json, require_all_tokens, tokenizer_tree
from edgedistill.strict import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
SPACE_MARK = "\u2581"
# Whatever their type in the file, llama.cpp reads these as tokens, in plain text too.
ALWAYS_PARSED = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
# Phi-3's special tokens take the white space behind them, but for these.
NEVER_STRIPPED = ("<unk>", "<s>", "<|endoftext|>")
KNOWN_TOKENIZERS = (
    "byte-level BPE, SentencePiece-style BPE with byte fallback (as in Llama 2, Gemma), SentencePiece unigram, "
    "WordPiece as in BERT"
)


@dataclass(frozen=True)
class GgufTokenizer:
    """What a GGUF says about its tokenizer. Lists are indexed by token id; `special` maps llama.cpp's roles (bos,
    eos, unknown, padding, seperator, mask) to ids; `extra` holds further keys under `tokenizer.ggml.`.
    `notes`: the texts for which llama.cpp is known to differ from the original. `strips_right`: as Phi-3's, special
    tokens take the white space behind them, which llama.cpp does for a model of such a name (see `general_name`)."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str
    notes: list[str] = field(default_factory=list)
    strips_right: bool = False
    extra: dict[str, bool | bytes] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    sampling: Mapping[str, int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizerFiles:
    """The parsed JSON files of a tokenizer's folder; `where` names tokenizer.json."""

    where: str
    tokenizer: dict[str, Any]
    config: dict[str, Any]
    special_map: dict[str, Any]
    model_config: dict[str, Any]
    template: str


def read_files(folder: Path) -> TokenizerFiles:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise no_tokenizer_json(folder)
    require_all_tokens(folder)
    optional = {
        name: read_json(folder / name, what=name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json")
    }
    return TokenizerFiles(
        where=str(path),
        tokenizer=tokenizer_tree(path),
        config=optional["tokenizer_config.json"],
        special_map=optional["special_tokens_map.json"],
        model_config=optional["config.json"],
        template=chat_templates(folder).get(DEFAULT_TEMPLATE, ""),
    )


def assemble(
    files: TokenizerFiles,
    vocab: Mapping[str, int],
    vocab_size: int,
    *,
    kind: str,
    pre: str = "default",
    unknown_token: str | None = None,
    scores: Mapping[str, float] | None = None,
    merges: list[str] | None = None,
    space: bool = False,
    roles: tuple[str, str] = ("bos", "eos"),
    extra: dict[str, bool | bytes] | None = None,
    notes: list[str],
) -> GgufTokenizer:
    """The tokenizer of llama.cpp's model `kind` from a model's vocabulary and the folder's added tokens.

    `roles`: what llama.cpp calls the tokens that it puts before and after a text. `scores`: of tokens that have one.
    """
    added = files.tokenizer.get("added_tokens") or []
    by_id = _by_id(vocab, added, vocab_size, files.where)
    _require_found_as_written(added, files.tokenizer.get("normalizer"), files.where)
    tokens, types = _tokens(by_id, added, vocab_size, kind, unknown_token)
    special = _special_tokens(files, unknown_token, {token: token_id for token_id, token in by_id.items()})
    ends = added_ends(files.tokenizer, where=files.where)
    _set_ends(special, ends, roles, tokens, files.where)
    # A token that the merges reach keeps its place among them, whatever else it is.
    scored = [] if scores is None else [scores.get(token, 0.0) for token in tokens]
    return GgufTokenizer(
        model=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scored,
        merges=merges or [],
        special=special,
        add_bos=ends[0] is not None,
        add_eos=ends[1] is not None and roles[1] == "eos",
        add_space_prefix=space,
        chat_template=files.template,
        notes=[*notes, *_notes_on_added(added, kind, strips_right=_strips_as_phi3(added))],
        strips_right=_strips_as_phi3(added),
        extra=extra or {},
    )


def added_ends(tokenizer: Mapping[str, Any], *, where: str) -> tuple[str | None, str | None]:
    """The tokens that encoding with special tokens puts before and after a text, from a parsed tokenizer.json.

    Its post-processor alone decides, as in transformers 5, which ignores `add_bos_token` and `add_eos_token`
    of tokenizer_config.json where there is a tokenizer.json.
    """
    return _ends_of_template(tokenizer.get("post_processor"), where)


def unknown(where: str, what: str) -> UserError:
    return UserError(f"{where}: llama.cpp has no tokenizer for {what}", f"known: {KNOWN_TOKENIZERS}; {OWN_CONVERTER}")


def type_of(part: Any) -> str:
    return str(part.get("type")) if isinstance(part, dict) else "none"


def parts_of(part: Any, key: str) -> list[Any]:
    """The steps of a normalizer or pre-tokenizer: those under `key` of a Sequence, itself, or none."""
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return [step for inner in part.get(key, []) for step in parts_of(inner, key)]
    return [part]


def _by_id(vocab: Mapping[str, int], added: list[dict[str, Any]], vocab_size: int, where: str) -> dict[int, str]:
    by_id: dict[int, str] = {}
    for token, token_id in [*vocab.items(), *((a["content"], a["id"]) for a in added)]:
        if by_id.setdefault(int(token_id), token) != token:
            raise UserError(
                f"{where}: id {token_id} is both {by_id[int(token_id)]!r} and {token!r}", "give each token its own id"
            )
    if max(by_id, default=-1) >= vocab_size:
        raise UserError(
            f"{where}: {max(by_id) + 1:,} tokens, but the model's embedding has {vocab_size:,} rows",
            "use the tokenizer that the model was trained with, or enlarge the embedding before training",
        )
    ids = {token: token_id for token_id, token in by_id.items()}
    if len(ids) != len(by_id):
        twice = next(t for i, t in by_id.items() if ids[t] != i)
        raise UserError(f"{where}: token {twice!r} has two ids", "give each token one id")
    return by_id


def _tokens(
    by_id: Mapping[int, str], added: list[dict[str, Any]], vocab_size: int, kind: str, unknown_token: str | None
) -> tuple[list[str], list[int]]:
    added_type = {int(a["id"]): CONTROL if a.get("special") else USER_DEFINED for a in added}
    taken = set(by_id.values())
    tokens, types = [], []
    for token_id in range(vocab_size):
        token = by_id.get(token_id)
        if token is None:
            token = f"[PAD{token_id}]"
            while token in taken:
                token += "_"
            kind_of = UNUSED
        elif kind in ("llama", "t5") and token == unknown_token:
            kind_of = UNKNOWN
        elif token_id in added_type:
            kind_of = added_type[token_id]
        else:
            kind_of = BYTE if kind == "llama" and token in BYTES else NORMAL
        tokens.append(token)
        types.append(kind_of)
    return tokens, types


def _special_tokens(files: TokenizerFiles, unknown_token: str | None, ids: Mapping[str, int]) -> dict[str, int]:
    special = {}
    names = {
        "bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token", "mask": "mask_token",
    }  # fmt: skip
    for name, key in names.items():
        content = _content(files.config.get(key)) or _content(files.special_map.get(key))
        if content is None and name == "unknown":
            content = unknown_token
        if content is not None:
            if content not in ids:
                raise UserError(
                    f"{files.where}: {key} {content!r} has no id", "save model and tokenizer again with the same tokens"
                )
            special[name] = ids[content]
            continue
        fallback = files.model_config.get(f"{key}_id")
        fallback = fallback[0] if isinstance(fallback, list) and fallback else fallback
        if isinstance(fallback, int) and 0 <= fallback < len(ids):
            special[name] = fallback
    return special


def _set_ends(
    special: dict[str, int], ends: tuple[str | None, str | None], roles: tuple[str, str], tokens: list[str], where: str
) -> None:
    for role, token in zip(roles, ends, strict=True):
        if token is None:
            continue
        token_id = tokens.index(token) if token in tokens else None
        if token_id is None or special.setdefault(role, token_id) != token_id:
            raise UserError(
                f"{where}: the post-processor adds {token!r}, which is not the {role}_token",
                f"make it the {role}_token in tokenizer_config.json; llama.cpp can add no other",
            )


def _require_found_as_written(added: list[dict[str, Any]], normalizer: Any, where: str) -> None:
    """Refuse words that were added so that they are looked for as the normalizer leaves them: llama.cpp looks for what
    stands in the file. "<new>" behind Llama's normalizer is found with a space before it, and nowhere else."""
    words = [str(a["content"]) for a in added if a.get("normalized", not a.get("special")) and not a.get("special")]
    if normalizer is None or not words:
        return
    from tokenizers import Tokenizer

    model = {"type": "BPE", "vocab": {}, "merges": []}
    written = {"version": "1.0", "added_tokens": [], "normalizer": normalizer, "model": model}
    normalize = Tokenizer.from_str(json.dumps(written)).normalizer.normalize_str
    other = [(word, found) for word in words if (found := normalize(word)).replace(SPACE_MARK, " ") != word]
    if other:
        word, found = other[0]
        raise UserError(
            f"{where}: the added token {word!r} is normalized, so that it is found in a text as {found!r}"
            f"{f', and {len(other) - 1} more like it' if len(other) > 1 else ''}; llama.cpp finds it as {word!r}",
            "add it as AddedToken(..., normalized=False) before training, or choose a format that transformers itself"
            " reads (bitsandbytes)",
        )


def _strips_as_phi3(added: list[dict[str, Any]]) -> bool:
    strips = {str(a["content"]): bool(a.get("rstrip")) for a in added}
    other = any(a.get("lstrip") or a.get("single_word") for a in added)
    named = {"</s>", *NEVER_STRIPPED} <= strips.keys()  # llama.cpp looks for these by name
    return named and not other and all(strips[t] != (t in NEVER_STRIPPED) for t in strips)


def _notes_on_added(added: list[dict[str, Any]], kind: str, *, strips_right: bool) -> list[str]:
    notes = []
    # Where all spaces around words are dropped, those around special tokens are too.
    drops_spaces = kind in ("bert", "t5")
    around = [
        a["content"]
        for a in added
        if a.get("single_word") or (not drops_spaces and (a.get("lstrip") or a.get("rstrip")))
    ]
    if strips_right:
        notes.append("llama.cpp strips only ASCII white space behind special tokens, not U+00A0 and the like")
    elif around:
        notes.append(f"llama.cpp does not strip spaces or look for word ends around {_listed(around)}")
    parsed = [a["content"] for a in added if a.get("special") and a["content"] in ALWAYS_PARSED]
    if parsed:
        notes.append(f"llama.cpp reads {_listed(parsed)} as control tokens in plain text too")
    return notes


def _listed(tokens: list[str]) -> str:
    return ", ".join(repr(t) for t in tokens[:5]) + (f" and {len(tokens) - 5} more" if len(tokens) > 5 else "")


def _ends_of_template(processor: Any, where: str) -> tuple[str | None, str | None]:
    if processor is None or processor.get("type") == "ByteLevel":
        return None, None
    if processor.get("type") == "Sequence":
        found = [_ends_of_template(p, where) for p in processor.get("processors", [])]
        found = [ends for ends in found if ends != (None, None)]
        if len(found) > 1:
            raise unknown(where, "a post-processor that adds tokens more than once")
        return found[0] if found else (None, None)
    if processor.get("type") in ("BertProcessing", "RobertaProcessing"):
        return processor["cls"][0], processor["sep"][0]
    if processor.get("type") != "TemplateProcessing":
        raise unknown(where, f"a {processor.get('type')} post-processor")
    around: tuple[list[str], list[str]] = ([], [])
    behind = 0
    for part in processor.get("single", []):
        if "Sequence" in part:
            behind = 1
        else:
            name = part["SpecialToken"]["id"]
            around[behind].extend(processor["special_tokens"][name]["tokens"])
    if len(around[0]) > 1 or len(around[1]) > 1:
        raise unknown(where, f"a post-processor that adds {around[0] + around[1]}")
    return (around[0][0] if around[0] else None, around[1][0] if around[1] else None)


def _content(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None
