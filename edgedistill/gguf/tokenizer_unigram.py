"""SentencePiece's unigram model (T5, XLM-R, ALBERT) as a GGUF's tokenizer."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from edgedistill.gguf.tokenizer_files import (
    SPACE_MARK,
    GgufTokenizer,
    TokenizerFiles,
    assemble,
    parts_of,
    type_of,
    unknown,
)

SEVERAL_SPACES = " {2,}"
CLUSTERS_NOTE = (
    "llama.cpp's unigram replaces characters one by one where the original replaces a character with its combining "
    "marks and joiners: compatibility forms with marks, and scripts written with marks (Devanagari and other Indic "
    "scripts, Thai, Hebrew and Arabic points, emoji sequences), may differ"
)


def unigram(files: TokenizerFiles, model: Mapping[str, Any], vocab_size: int) -> GgufTokenizer:
    pieces = model.get("vocab")
    if not isinstance(pieces, list) or not pieces:
        raise unknown(files.where, "a Unigram model without pieces")
    if model.get("byte_fallback"):
        raise unknown(files.where, "a Unigram model with byte fallback")
    unk_id = model.get("unk_id")
    if not isinstance(unk_id, int):
        raise unknown(files.where, "a Unigram model without an unknown token")
    vocab = {str(piece): i for i, (piece, _) in enumerate(pieces)}
    charsmap, merges_spaces, strips_right = _normalizer(files)
    prefix, split_at_spaces = _pre_tokenizer(files, vocab)
    extra: dict[str, bool | bytes] = {"remove_extra_whitespaces": merges_spaces or split_at_spaces}
    if charsmap:
        extra["precompiled_charsmap"] = charsmap
    return assemble(
        files, vocab, vocab_size, kind="t5", unknown_token=str(pieces[unk_id][0]), space=prefix,
        scores={str(piece): float(score) for piece, score in pieces}, extra=extra,
        notes=_notes(bool(charsmap), merges_spaces or split_at_spaces, strips_right, split_at_spaces),
    )  # fmt: skip


def _normalizer(files: TokenizerFiles) -> tuple[bytes, bool, bool]:
    """The map of characters, whether runs of spaces become one, whether those at the end are dropped."""
    charsmap, merges_spaces, strips_right = b"", False, False
    for step in parts_of(files.tokenizer.get("normalizer"), "normalizers"):
        kind = step.get("type")
        if kind == "Precompiled" and not charsmap and not merges_spaces:
            charsmap = base64.b64decode(step.get("precompiled_charsmap") or "")
        elif kind == "Replace" and step.get("pattern") == {"Regex": SEVERAL_SPACES}:
            merges_spaces = True
        elif kind == "Strip" and step.get("strip_right"):
            strips_right = True
        else:
            raise unknown(files.where, f"Unigram with a {kind} normalizer")
    return charsmap, merges_spaces, strips_right


def _pre_tokenizer(files: TokenizerFiles, vocab: Mapping[str, int]) -> tuple[bool, bool]:
    """Whether a text gets a space in front, and whether it is cut at spaces before."""
    steps = parts_of(files.tokenizer.get("pre_tokenizer"), "pretokenizers")
    split_at_spaces = bool(steps) and type_of(steps[0]) == "WhitespaceSplit"
    metaspace = steps[1:] if split_at_spaces else steps
    if [type_of(s) for s in metaspace] != ["Metaspace"] or metaspace[0].get("replacement") != SPACE_MARK:
        raise unknown(files.where, f"Unigram with pre-tokenizer {[type_of(s) for s in steps]}")
    scheme = metaspace[0].get("prepend_scheme", "always" if metaspace[0].get("add_prefix_space", True) else "never")
    inner = next((piece for piece in vocab if SPACE_MARK in piece[1:]), None)
    if inner is not None and metaspace[0].get("split", True):
        raise unknown(files.where, f"a Metaspace that splits although {inner!r} is a token")
    return scheme != "never", split_at_spaces


def _notes(has_charsmap: bool, merges_spaces: bool, strips_right: bool, split_at_spaces: bool) -> list[str]:
    """What tests/gguf/test_gguf_unigram.py finds, by class."""
    notes = ["llama.cpp's unigram reads neither U+2581 in a text nor control tokens in plain text as the original does"]
    if has_charsmap:
        notes.append(CLUSTERS_NOTE)
    if split_at_spaces:
        notes.append(
            "llama.cpp's unigram keeps line ends, tabs and the like where the character map does not replace them"
        )
    elif strips_right:
        notes.append(
            "llama.cpp's unigram keeps line ends, tabs and the like at the end of a text; the original drops them"
        )
    elif merges_spaces:
        notes.append("llama.cpp's unigram drops spaces at the end of a text; the original keeps one")
    if not merges_spaces:
        notes.append("llama.cpp's unigram puts one more space before a text that begins with one")
    return notes
