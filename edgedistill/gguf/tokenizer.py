"""A Hugging Face tokenizer (tokenizer.json and its neighbours) as the metadata of a GGUF.

llama.cpp has its own code for every tokenizer that it knows and chooses by name, so what is not
recognised here by its structure is refused: a near miss gives other tokens and no error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.errors import UserError
from edgedistill.weights import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
SPACE_MARK = "\u2581"
BYTES = frozenset(f"<0x{value:02X}>" for value in range(256))

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is cut before byte-level BPE → llama.cpp's name for it (`tokenizer.ggml.pre`).
SPLIT_REGEXES = {
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL: "llama-bpe",
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL: "qwen2",
}
KNOWN_TOKENIZERS = (
    "byte-level BPE cut as by GPT-2, Llama 3, Qwen 2 or SmolLM; "
    "SentencePiece-style BPE with byte fallback as in Llama 2"
)


@dataclass(frozen=True)
class GgufTokenizer:
    """What a GGUF says about its tokenizer. Lists are indexed by token id; `special` maps bos, eos, unknown,
    padding to ids. `notes`: where llama.cpp is known to differ from the original."""

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


@dataclass(frozen=True)
class _Files:
    """The parsed JSON files of a tokenizer's folder; `where` names tokenizer.json."""

    where: str
    tokenizer: dict[str, Any]
    config: dict[str, Any]
    special_map: dict[str, Any]
    model_config: dict[str, Any]
    template_file: str


def read_tokenizer(folder: Path, *, vocab_size: int) -> GgufTokenizer:
    """The tokenizer of a transformers folder for a model with `vocab_size` embedding rows.

    Rows without a token become unused tokens `[PAD<id>]`. Raises UserError for a tokenizer that llama.cpp
    would run differently, and for a vocabulary larger than the embedding.
    """
    files = _read_files(folder)
    model = files.tokenizer.get("model")
    if not isinstance(model, dict):
        raise _unknown(files.where, "no model")
    if not isinstance(model.get("vocab"), dict):
        raise _unknown(files.where, f"a {model.get('type')} model")
    _check_model(model, files.where)
    if model.get("byte_fallback"):
        return _sentencepiece_bpe(files, model, vocab_size)
    return _byte_level_bpe(files, model, vocab_size)


def added_ends(tokenizer: Mapping[str, Any], *, where: str) -> tuple[str | None, str | None]:
    """The tokens that encoding with special tokens puts before and after a text, from a parsed tokenizer.json.

    Its post-processor alone decides, as in transformers 5, which ignores `add_bos_token` and `add_eos_token`
    of tokenizer_config.json where there is a tokenizer.json.
    """
    return _template_ends(tokenizer.get("post_processor"), where)


def _read_files(folder: Path) -> _Files:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no tokenizer.json",
            "save the tokenizer once with transformers: AutoTokenizer.from_pretrained(dir).save_pretrained(dir)",
        )
    optional = {
        name: read_json(folder / name, what=name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json")
    }
    template = folder / "chat_template.jinja"
    return _Files(
        where=str(path),
        tokenizer=read_json(path, what="tokenizer.json"),
        config=optional["tokenizer_config.json"],
        special_map=optional["special_tokens_map.json"],
        model_config=optional["config.json"],
        template_file=template.read_text(encoding="utf-8") if template.is_file() else "",
    )


def _check_model(model: Mapping[str, Any], where: str) -> None:
    if model.get("type", "BPE") != "BPE":
        raise _unknown(where, f"a {model.get('type')} model")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _unknown(where, f"a BPE model with {key} {model[key]!r}")


def _byte_level_bpe(files: _Files, model: Mapping[str, Any], vocab_size: int) -> GgufTokenizer:
    pre = _pre_tokenizer_name(files.tokenizer.get("pre_tokenizer"), files.where)
    notes = []
    normalizer = files.tokenizer.get("normalizer")
    if normalizer is not None and normalizer.get("type") == "NFC":
        notes.append("llama.cpp does not compose characters (NFC): text with separate combining marks differs")
    elif normalizer is not None and normalizer != {"type": "Sequence", "normalizers": []}:
        raise _unknown(files.where, f"a {normalizer.get('type')} normalizer before byte-level BPE")
    if bool(model.get("ignore_merges")) != (pre == "llama-bpe"):
        notes.append(
            f"llama.cpp's '{pre}' {'ignores' if pre == 'llama-bpe' else 'follows'} the merges for a word that is "
            "a token of its own; the original does not"
        )
    merges = _merges(model, files.where)
    return _assemble(files, model, vocab_size, kind="gpt2", pre=pre, scores={}, merges=merges, space=False, notes=notes)


def _sentencepiece_bpe(files: _Files, model: Mapping[str, Any], vocab_size: int) -> GgufTokenizer:
    space, notes = _space_prefix(files.tokenizer, model, files.where)
    missing = sorted(BYTES - model["vocab"].keys())
    if missing:
        raise _unknown(files.where, f"byte fallback without tokens for {len(missing)} bytes ({missing[0]})")
    merges = _merges(model, files.where)
    rank: dict[str, int] = {}
    for position, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", "", 1), position)
    open_pair = _pair_without_merge(model["vocab"], merges, rank)
    if open_pair:
        raise _unknown(files.where, f"merges that leave out {open_pair}, which llama.cpp would join")
    # llama.cpp joins the neighbours whose union has the highest score: the earlier merge must score higher.
    unmerged = -float(len(merges))
    scores = {token: -float(rank[token]) if token in rank else unmerged for token in model["vocab"]}
    return _assemble(
        files, model, vocab_size, kind="llama", pre="default", scores=scores, merges=[], space=space, notes=notes
    )


def _assemble(
    files: _Files,
    model: Mapping[str, Any],
    vocab_size: int,
    *,
    kind: str,
    pre: str,
    scores: Mapping[str, float],
    merges: list[str],
    space: bool,
    notes: list[str],
) -> GgufTokenizer:
    added = files.tokenizer.get("added_tokens") or []
    by_id: dict[int, str] = {}
    for token, token_id in [*model["vocab"].items(), *((a["content"], a["id"]) for a in added)]:
        if by_id.setdefault(int(token_id), token) != token:
            raise UserError(
                f"{files.where}: id {token_id} is both {by_id[int(token_id)]!r} and {token!r}",
                "give each token its own id",
            )
    if max(by_id, default=-1) >= vocab_size:
        raise UserError(
            f"{files.where}: {max(by_id) + 1:,} tokens, but the model's embedding has {vocab_size:,} rows",
            "use the tokenizer that the model was trained with, or enlarge the embedding before training",
        )
    tokens, types = _tokens(by_id, added, model, vocab_size, kind)
    ids = {token: token_id for token_id, token in by_id.items()}
    if len(ids) != len(by_id):
        twice = next(t for i, t in by_id.items() if ids[t] != i)
        raise UserError(f"{files.where}: token {twice!r} has two ids", "give each token one id")
    special, add_bos, add_eos = _special(files, model, ids)
    for token in added:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            notes.append(f"llama.cpp does not strip spaces or look for word ends around {token['content']!r}")
    scored = [scores.get(t, 0.0) if of == NORMAL else 0.0 for t, of in zip(tokens, types, strict=True)]
    return GgufTokenizer(
        model=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scored if scores else [],
        merges=merges,
        special=special,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=space,
        chat_template=_chat_template(files),
        notes=notes,
    )


def _tokens(
    by_id: Mapping[int, str], added: list[dict[str, Any]], model: Mapping[str, Any], vocab_size: int, kind: str
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
        elif kind == "llama" and token == model.get("unk_token"):
            kind_of = UNKNOWN
        elif token_id in added_type:
            kind_of = added_type[token_id]
        else:
            kind_of = BYTE if kind == "llama" and token in BYTES else NORMAL
        tokens.append(token)
        types.append(kind_of)
    return tokens, types


def _special(files: _Files, model: Mapping[str, Any], ids: Mapping[str, int]) -> tuple[dict[str, int], bool, bool]:
    special = {}
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    for name, key in names.items():
        content = _content(files.config.get(key)) or _content(files.special_map.get(key))
        if content is None and name == "unknown":
            content = model.get("unk_token")
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
    ends = added_ends(files.tokenizer, where=files.where)
    for name, token in zip(("bos", "eos"), ends, strict=True):
        if token is None:
            continue
        if token not in ids or special.setdefault(name, ids[token]) != ids[token]:
            raise UserError(
                f"{files.where}: the post-processor adds {token!r}, which is not the {name}_token",
                f"make it the {name}_token in tokenizer_config.json; llama.cpp can add no other",
            )
    return special, ends[0] is not None, ends[1] is not None


def _template_ends(processor: Any, where: str) -> tuple[str | None, str | None]:
    if processor is None or processor.get("type") == "ByteLevel":
        return None, None
    if processor.get("type") == "Sequence":
        found = [_template_ends(p, where) for p in processor.get("processors", [])]
        found = [ends for ends in found if ends != (None, None)]
        if len(found) > 1:
            raise _unknown(where, "a post-processor that adds tokens more than once")
        return found[0] if found else (None, None)
    if processor.get("type") != "TemplateProcessing":
        raise _unknown(where, f"a {processor.get('type')} post-processor")
    around: tuple[list[str], list[str]] = ([], [])
    behind = 0
    for part in processor.get("single", []):
        if "Sequence" in part:
            behind = 1
        else:
            name = part["SpecialToken"]["id"]
            around[behind].extend(processor["special_tokens"][name]["tokens"])
    if len(around[0]) > 1 or len(around[1]) > 1:
        raise _unknown(where, f"a post-processor that adds {around[0] + around[1]}")
    return (around[0][0] if around[0] else None, around[1][0] if around[1] else None)


def _pre_tokenizer_name(pre: Any, where: str) -> str:
    parts = pre.get("pretokenizers", []) if isinstance(pre, dict) and pre.get("type") == "Sequence" else [pre]
    kinds = [p.get("type") if isinstance(p, dict) else None for p in parts]
    if not kinds or kinds[-1] != "ByteLevel":
        raise _unknown(where, f"pre-tokenizer {kinds}")
    if parts[-1].get("add_prefix_space"):
        raise _unknown(where, "byte-level BPE that puts a space before every text (add_prefix_space)")
    own_regex = parts[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and own_regex:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and own_regex and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not own_regex:
        split = parts[0]
        regex = split.get("pattern", {}).get("Regex")
        if str(split.get("behavior")).lower() == "isolated" and not split.get("invert") and regex in SPLIT_REGEXES:
            return SPLIT_REGEXES[regex]
        raise _unknown(where, f"text cut by {regex!r}")
    raise _unknown(where, f"pre-tokenizer {kinds}")


def _space_prefix(tokenizer: Mapping[str, Any], model: Mapping[str, Any], where: str) -> tuple[bool, list[str]]:
    """Whether a text gets a space in front, from the two ways in which tokenizer.json says so."""
    normalizer, pre = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    prepend = {"type": "Prepend", "prepend": SPACE_MARK}
    steps = normalizer.get("normalizers") if normalizer and normalizer.get("type") == "Sequence" else [normalizer]
    if pre is None and steps == [prepend, replace]:
        return True, []
    if pre is None and steps == [replace]:
        return False, []
    if normalizer is None and isinstance(pre, dict) and pre.get("type") == "Metaspace":
        inner = next((t for t in model["vocab"] if SPACE_MARK in t[1:] and t not in BYTES), None)
        scheme = pre.get("prepend_scheme", "always" if pre.get("add_prefix_space", True) else "never")
        if pre.get("replacement") == SPACE_MARK and (inner is None or not pre.get("split", True)):
            if scheme == "never":
                return False, []
            notes = ["llama.cpp puts a space before a text that begins with one; the original does not"]
            if scheme == "first":
                notes.append("llama.cpp puts a space after each special token in a text; the original does not")
            return True, notes
        raise _unknown(where, f"a Metaspace that splits although {inner!r} is a token")
    raise _unknown(where, f"byte fallback with normalizer {_type(normalizer)} and pre-tokenizer {_type(pre)}")


def _pair_without_merge(vocab: Mapping[str, int], merges: list[str], rank: Mapping[str, int]) -> str | None:
    """Two tokens that no merge joins although their union is a token that merges reach; None where all are joined."""
    known = set(merges)
    for token in rank:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            reachable = all(len(part) == 1 or part in rank for part in (left, right))
            if reachable and left in vocab and right in vocab and f"{left} {right}" not in known:
                return f"{left!r} + {right!r}"
    return None


def _merges(model: Mapping[str, Any], where: str) -> list[str]:
    merges = model.get("merges")
    if not isinstance(merges, list) or not merges:
        raise _unknown(where, "a BPE model without merges")
    return [m if isinstance(m, str) else " ".join(m) for m in merges]


def _chat_template(files: _Files) -> str:
    if files.template_file:
        return files.template_file
    written = files.config.get("chat_template")
    if isinstance(written, list):
        named = {entry.get("name"): entry.get("template") for entry in written if isinstance(entry, dict)}
        written = named.get("default")
    return written if isinstance(written, str) else ""


def _content(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _type(part: Any) -> str:
    return str(part.get("type")) if isinstance(part, dict) else "none"


def _unknown(where: str, what: str) -> UserError:
    return UserError(f"{where}: llama.cpp has no tokenizer for {what}", f"known: {KNOWN_TOKENIZERS}")
