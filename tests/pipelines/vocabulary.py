"""Small vocabularies of every kind of tokenizer, made of a few words: WordPiece, unigram, BPE, and their files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

WORDS = (
    *("the", "fox", "dog", "river", "lamp", "girl", "jumps", "over", "lazy", "quiet", "Fox", "The", "and", "a", "I"),
    *("naive", "naïve", "cafe", "café", "10", "25", "東京", "你", "мир"),
)
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-()*+éïüß你東мир"
SPACE = "▁"
MERGED = ("the", "fox", "dog", "river", "over", "Fox")


def word_pieces(specials: Sequence[str]) -> dict[str, int]:
    """WordPiece: special tokens, letters at a word's beginning and within, whole words."""
    return _numbered([*specials, *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS])


def unigrams(specials: Sequence[str]) -> list[tuple[str, float]]:
    """Pieces and scores, special tokens first; words are likelier than their letters."""
    words = [*(SPACE + word for word in WORDS), *WORDS]
    pieces = [*((token, 0.0) for token in specials), (SPACE, -3.0), *((word, -4.0) for word in words)]
    pieces += [(letter, -6.0) for letter in LETTERS]
    return list({piece: (piece, score) for piece, score in pieces}.values())


def byte_pairs(specials: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE: special tokens, 256 bytes, and merges for a few words with and without their space."""
    from tokenizers import pre_tokenizers

    return _merged([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())], ("Ġ", ""), "")


def space_pairs(
    specials: Sequence[str], *, byte_fallback: bool = False
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """BPE of characters as sentencepiece writes it: a space is ▁; bytes as <0x00> where asked."""
    table = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    return _merged([*specials, *table, SPACE, *LETTERS], (SPACE, ""), "")


def ending_pairs(specials: Sequence[str], end: str = "</w>") -> tuple[dict[str, int], list[tuple[str, str]]]:
    """BPE whose words end with a mark."""
    from tokenizers import pre_tokenizers

    letters = dict.fromkeys([*LETTERS, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    return _merged([*specials, *letters, *(letter + end for letter in letters)], ("",), end)


def joined_words(specials: Sequence[str], mark: str = "@@") -> tuple[list[str], list[str]]:
    """fastBPE's: pieces within a word end with @@; its merges with counts."""
    vocab, merges = ending_pairs([])
    pieces = [token.removesuffix("</w>") if token.endswith("</w>") else token + mark for token in vocab]
    return list(dict.fromkeys([*specials, *pieces])), [f"{left} {right} 9" for left, right in merges]


def lines(path: Path, rows: Sequence[str]) -> str:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def as_json(path: Path, value: object) -> str:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return str(path)


def sentencepiece_model(path: Path, *, kind: str = "unigram", **options: object) -> str:
    """A sentencepiece model trained on a few lines."""
    import sentencepiece

    corpus = [" ".join(WORDS[i:] + WORDS[:i]) + " " + LETTERS for i in range(len(WORDS))] * 4
    made = path.with_suffix(".of")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(made), vocab_size=160, model_type=kind, minloglevel=2,
        hard_vocab_limit=False, character_coverage=1.0, num_threads=1, **options,
    )  # fmt: skip
    made.with_name(made.name + ".vocab").unlink()
    made.with_name(made.name + ".model").rename(path)
    return str(path)


def _merged(start: Sequence[str], before: Sequence[str], end: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokens = dict.fromkeys(start)
    merges: dict[tuple[str, str], None] = {}
    for word in MERGED:
        for first in before:
            parts = [*([first] if first else []), *word[:-1], word[-1] + end]
            whole = parts[0]
            for part in parts[1:]:
                merges[whole, part] = None
                whole += part
                tokens[whole] = None
    return _numbered(list(tokens)), list(merges)


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}
