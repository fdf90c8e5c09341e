"""WordPiece, BERT's kind, as a GGUF's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgedistill.errors import UserError
from edgedistill.gguf.tokenizer_files import SPACE_MARK, GgufTokenizer, TokenizerFiles, added_ends, assemble, unknown

PREFIX = "##"
HANGUL_NOTE = "llama.cpp's WordPiece keeps only the first letter of a Hangul syllable (Korean): its tokens differ"
MARKS_NOTE = (
    "llama.cpp's WordPiece drops spacing and enclosing marks, which the original keeps: text in Devanagari, Bengali, "
    "Gurmukhi, Gujarati, Oriya, Tamil, Telugu, Kannada, Malayalam, Sinhala, Khmer, Myanmar, Javanese, Balinese and "
    "other scripts with such vowel signs differs"
)
CONTROLS_NOTE = (
    "llama.cpp's WordPiece differs at vertical tabs, form feeds, U+0085 and U+2581, and at marks, punctuation and "
    "capitals newer than Unicode 8"
)
CASE_NOTE = "llama.cpp's WordPiece drops the dot of U+0130 (the Turkish capital I with a dot)"


def wordpiece(files: TokenizerFiles, model: Mapping[str, Any], vocab_size: int) -> GgufTokenizer:
    """llama.cpp marks the pieces that begin a word where BERT marks those that go on, and always puts the first and
    the last token around a text."""
    lowercase, strip_accents = _normalizer(files)
    pre = files.tokenizer.get("pre_tokenizer") or {}
    if pre.get("type") != "BertPreTokenizer":
        raise unknown(files.where, f"WordPiece with pre-tokenizer {pre.get('type')}")
    if model.get("continuing_subword_prefix") != PREFIX:
        raise unknown(files.where, f"WordPiece with the prefix {model.get('continuing_subword_prefix')!r}")
    if None in added_ends(files.tokenizer, where=files.where):
        raise unknown(files.where, "WordPiece that does not put a token before and after every text")
    whole = {str(model.get("unk_token")), *(str(a["content"]) for a in files.tokenizer.get("added_tokens") or [])}
    vocab: dict[str, int] = {}
    for token, token_id in model["vocab"].items():
        written = token if token in whole else token[len(PREFIX) :] if token.startswith(PREFIX) else SPACE_MARK + token
        if written in vocab or not written:
            raise UserError(
                f"{files.where}: token {token!r} would be {written!r} in a GGUF, which is taken or empty",
                "llama.cpp cannot tell these tokens apart: train the tokenizer without one of them",
            )
        vocab[written] = token_id
    return assemble(
        files, vocab, vocab_size, kind="bert", unknown_token=model.get("unk_token"), roles=("bos", "seperator"),
        extra={
            "normalizer.lowercase": lowercase, "normalizer.strip_accents": strip_accents, "add_sep_token": True,
        },
        notes=_notes(
 lowercase=lowercase, strip_accents=strip_accents, longest=int(model.get('max_input_chars_per_word', 100))
        ),
    )  # fmt: skip


def _normalizer(files: TokenizerFiles) -> tuple[bool, bool]:
    normalizer = files.tokenizer.get("normalizer") or {}
    if normalizer.get("type") != "BertNormalizer":
        raise unknown(files.where, f"WordPiece with normalizer {normalizer.get('type')}")
    for key in ("clean_text", "handle_chinese_chars"):
        if not normalizer.get(key):
            raise unknown(files.where, f"WordPiece without {key}")
    lowercase = bool(normalizer.get("lowercase"))
    strip = normalizer.get("strip_accents")
    return lowercase, lowercase if strip is None else bool(strip)


def _notes(*, lowercase: bool, strip_accents: bool, longest: int) -> list[str]:
    """What tests/gguf/test_gguf_wordpiece.py finds over every character of Unicode, by class."""
    notes = [
        CONTROLS_NOTE,
        f"llama.cpp has no longest word; the original makes one of over {longest} characters unknown",
    ]
    if strip_accents:
        return [HANGUL_NOTE, MARKS_NOTE, *notes]
    return [*notes, CASE_NOTE] if lowercase else notes
