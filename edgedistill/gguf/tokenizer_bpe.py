"""BPE as a GGUF's tokenizer: over bytes (GPT-2's kind), or over characters with byte fallback (SentencePiece's)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgedistill.gguf.pretokenizers import find_pre_tokenizer
from edgedistill.gguf.tokenizer_files import (
    SPACE_MARK,
    GgufTokenizer,
    TokenizerFiles,
    assemble,
    parts_of,
    type_of,
    unknown,
)
from edgedistill.models.hf_tokenizer import BYTES

PRE = "pretokenizers"
NFC_NOTE = "llama.cpp does not compose characters (NFC): text with separate combining marks differs"


def bpe(files: TokenizerFiles, model: Mapping[str, Any], vocab_size: int) -> GgufTokenizer:
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise unknown(files.where, f"a BPE model with {key} {model[key]!r}")
    if not isinstance(model.get("vocab"), dict):
        raise unknown(files.where, f"a {model.get('type')} model")
    if model.get("byte_fallback"):
        return _sentencepiece_bpe(files, model, vocab_size)
    return _byte_level_bpe(files, model, vocab_size)


def _byte_level_bpe(files: TokenizerFiles, model: Mapping[str, Any], vocab_size: int) -> GgufTokenizer:
    pre_tokenizer, normalizer = files.tokenizer.get("pre_tokenizer"), files.tokenizer.get("normalizer")
    if any(part.get("type") == "ByteLevel" and part.get("add_prefix_space") for part in parts_of(pre_tokenizer, PRE)):
        raise unknown(files.where, "byte-level BPE that puts a space before every text (add_prefix_space)")
    notes = []
    for step in parts_of(normalizer, "normalizers"):
        if step.get("type") != "NFC":
            raise unknown(files.where, f"a {step.get('type')} normalizer before byte-level BPE")
        notes.append(NFC_NOTE)
    merges = _merges(model, files.where)
    found = find_pre_tokenizer(pre_tokenizer, model, where=files.where)
    return assemble(
        files, model["vocab"], vocab_size, kind="gpt2", pre=found.name, merges=merges,
        unknown_token=model.get("unk_token"), notes=[*notes, *found.notes],
    )  # fmt: skip


def _sentencepiece_bpe(files: TokenizerFiles, model: Mapping[str, Any], vocab_size: int) -> GgufTokenizer:
    space, notes = _space_prefix(files.tokenizer, model, files.where)
    missing = sorted(BYTES - model["vocab"].keys())
    if missing:
        raise unknown(files.where, f"byte fallback without tokens for {len(missing)} bytes ({missing[0]})")
    merges = _merges(model, files.where)
    rank: dict[str, int] = {}
    for position, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", "", 1), position)
    open_pair = _pair_without_merge(model["vocab"], merges, rank)
    if open_pair:
        raise unknown(files.where, f"merges that leave out {open_pair}, which llama.cpp would join")
    # llama.cpp joins the neighbours whose union has the highest score: the earlier merge must score higher.
    unmerged = -float(len(merges))
    scores = {token: -float(rank[token]) if token in rank else unmerged for token in model["vocab"]}
    return assemble(
        files, model["vocab"], vocab_size, kind="llama", scores=scores, space=space,
        unknown_token=model.get("unk_token"), notes=notes,
    )  # fmt: skip


def _space_prefix(tokenizer: Mapping[str, Any], model: Mapping[str, Any], where: str) -> tuple[bool, list[str]]:
    """Whether a text gets a space in front, from the two ways in which tokenizer.json says so."""
    normalizer, pre = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    prepend = {"type": "Prepend", "prepend": SPACE_MARK}
    steps = normalizer.get("normalizers") if normalizer and normalizer.get("type") == "Sequence" else [normalizer]
    if pre is None and steps == [prepend, replace]:
        return True, []
    # Gemma's cut at spaces finds none: the normalizer has replaced them all.
    cut_at_spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if steps == [replace] and pre in (None, cut_at_spaces):
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
        raise unknown(where, f"a Metaspace that splits although {inner!r} is a token")
    raise unknown(where, f"byte fallback with normalizer {type_of(normalizer)} and pre-tokenizer {type_of(pre)}")


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
        raise unknown(where, "a BPE model without merges")
    return [m if isinstance(m, str) else " ".join(m) for m in merges]
