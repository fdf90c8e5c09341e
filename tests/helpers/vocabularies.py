"""Tokenizers that give away how a text was cut, random texts, and llama.cpp with a vocabulary alone."""

from __future__ import annotations

import functools
import json
import random
import string
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgedistill.gguf.tokenizer import add_tokenizer, general_name, read_tokenizer
from edgedistill.runtimes.process import RuntimeProcess

# One or more of every kind of character that tokenizers tell apart.
ALPHABET = (
    "aZ\u00e9\u00c9\u01c5\u02b0\u4f60\u3042\ud55c\u0e01\u0915\u0940\u093e\u094d\u0301\u0327"
    "1\u0663\u00bd\u2167 \u00a0\u3000\t\n\r\u0085\u2028'strevlmdSL\u017fK.,!?/-_$+<^`|~(\u2026\u3002\u060c\u00a8"
    "\U0001f642\u200d\u200b\ue000\u0378\u0001\u007f\u2581\u0130\u0131"
)
SEQUENCES = (
    *("the", " The", "I'm", "DON'T", "12345", "e\u0301", "\r\n", "  ", "\u0995\u09cb", "\u1112\u1161\u11ab", "\ufb01"),
    *("\U0001f44d\U0001f3fd", "\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "1\ufe0f\u20e3", "\u2764\ufe0f"),
)
# Letters and digits of Unicode 16, which llama.cpp's tables do not have: the only characters whose class differs
# between llama.cpp and the tokenizers library, found by asking both for every one of Unicode.
UNKNOWN_TO_LLAMA_CPP = (
    (0x1C89, 0x1C8A), (0xA7CB, 0xA7CD), (0xA7DA, 0xA7DC), (0x105C0, 0x105F3), (0x10D40, 0x10D65), (0x10D6F, 0x10D85),
    (0x10EC2, 0x10EC4), (0x11380, 0x11389), (0x1138B, 0x1138B), (0x1138E, 0x1138E), (0x11390, 0x113B5),
    (0x113B7, 0x113B7), (0x113D1, 0x113D1), (0x113D3, 0x113D3), (0x116D0, 0x116E3), (0x11BC0, 0x11BE0),
    (0x11BF0, 0x11BF9), (0x13460, 0x143FA), (0x16100, 0x1611D), (0x16130, 0x16139), (0x16D40, 0x16D6C),
    (0x16D70, 0x16D79), (0x18CFF, 0x18CFF), (0x1CCF0, 0x1CCF9), (0x1E5D0, 0x1E5ED), (0x1E5F0, 0x1E5FA),
)  # fmt: skip
# Its marks and signs, which matter to the pre-tokenizers that tell them from each other.
NEW_SIGNS = (
    (0x897, 0x897), (0x1B4E, 0x1B4F), (0x1B7F, 0x1B7F), (0x2427, 0x2429), (0x31E4, 0x31E5), (0x10D69, 0x10D6E),
    (0x10D8E, 0x10D8F), (0x10EFC, 0x10EFC), (0x113B8, 0x113C0), (0x113C2, 0x113C2), (0x113C5, 0x113C5),
    (0x113C7, 0x113CA), (0x113CC, 0x113D0), (0x113D2, 0x113D2), (0x113D4, 0x113D5), (0x113D7, 0x113D8),
    (0x113E1, 0x113E2), (0x11BE1, 0x11BE1), (0x11F5A, 0x11F5A), (0x1611E, 0x1612F), (0x16D6D, 0x16D6F),
    (0x1CC00, 0x1CCEF), (0x1CD00, 0x1CEB3), (0x1E5EE, 0x1E5EF), (0x1E5FF, 0x1E5FF), (0x1F8B2, 0x1F8BB),
    (0x1F8C0, 0x1F8C1), (0x1FA89, 0x1FA89), (0x1FA8F, 0x1FA8F), (0x1FABE, 0x1FABE), (0x1FAC6, 0x1FAC6),
    (0x1FADC, 0x1FADC), (0x1FADF, 0x1FADF), (0x1FAE9, 0x1FAE9), (0x1FBCB, 0x1FBEF),
)  # fmt: skip
ASSIGNED_UP_TO = 0x32400  # above: nothing but tags, selectors and private use


def unknown_to_llama_cpp(text: str, *ranges: tuple[int, int]) -> bool:
    return any(first <= ord(c) <= last for c in text for first, last in ranges or UNKNOWN_TO_LLAMA_CPP)


@functools.cache
def random_texts(count: int = 10_000, seed: int = 0) -> tuple[str, ...]:
    """Scripts, emoji, marks, controls, spaces and digits in runs, and noise of bytes; never a lone surrogate or NUL."""
    rng = random.Random(seed)
    return tuple("".join(_piece(rng) for _ in range(rng.randint(1, 10))) for _ in range(count))


def _piece(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(ALPHABET) * rng.choice((1, 1, 1, 2, 3, 5))
    if kind < 0.7:
        return rng.choice(SEQUENCES)
    if kind < 0.78:
        return "".join(rng.choices(string.printable, k=3))
    if kind < 0.84:
        return rng.randbytes(4).replace(b"\0", b"").decode("utf-8", errors="replace")
    code = rng.randint(1, ASSIGNED_UP_TO if kind < 0.92 else 0x3000)
    return chr(code) if not 0xD800 <= code <= 0xDFFF else "?"


def every_character(last: int = ASSIGNED_UP_TO) -> list[str]:
    return [chr(c) for c in range(1, last) if not 0xD800 <= c <= 0xDFFF]


def vocabulary_in_llama_cpp(folder: Path, vocab_size: int) -> RuntimeProcess:
    """llama.cpp, in its child process, with the folder's tokenizer converted into a GGUF without tensors."""
    from gguf import GGUFWriter

    out = folder / "vocabulary.gguf"
    writer = GGUFWriter(out, "llama")
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length"):
        writer.add_uint32(f"llama.{key}", 64)
    writer.add_uint32("llama.attention.head_count", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    tokenizer = read_tokenizer(folder, vocab_size=vocab_size)
    writer.add_string("general.name", general_name("a model", tokenizer))
    add_tokenizer(writer, tokenizer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return RuntimeProcess("llama.cpp", out, threads=1, context_tokens=0, use_extra_bufts=False)


def differing(
    folder: Path, runtime: RuntimeProcess, texts: Sequence[str], *, specials: bool = False, plain: bool = False
) -> list[str]:
    """The texts whose ids differ between llama.cpp and the folder's tokenizer.json. `specials`: with what encoding
    adds; `plain`: special tokens read as text."""
    from tokenizers import Tokenizer

    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    original.encode_special_tokens = plain
    expected = [e.ids for e in original.encode_batch(list(texts), add_special_tokens=specials)]
    found = runtime.tokenize_many(texts, add_special=specials, parse_special=not plain)
    return [text for text, a, b in zip(texts, expected, found, strict=True) if a != b]


def shortest(text: str, differs: Callable[[str], bool]) -> str:
    """`text` without every character that is not needed for the difference."""
    at = 0
    while at < len(text):
        shorter = text[:at] + text[at + 1 :]
        text, at = (shorter, 0) if shorter and differs(shorter) else (text, at + 1)
    return text


def has_category(text: str, *categories: str) -> bool:
    return any(unicodedata.category(c) in categories for c in text)


def boundary_bpe(folder: Path, pre_tokenizer: Any, *, ignore_merges: bool = False, normalizer: Any = None) -> int:
    """A byte-level BPE in which any two characters of ALPHABET, and many bytes, are joined unless they are cut
    apart, into `folder`: other words, other tokens. Returns the size of its vocabulary."""
    model = {"type": "BPE", "vocab": _joining()[0], "merges": _joining()[1], "ignore_merges": ignore_merges}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<|endoftext|>", **special}],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "model": model,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})
    )
    return len(_joining()[0])


@functools.cache
def _joining() -> tuple[dict[str, int], list[list[str]]]:
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = {c: byte_level.pre_tokenize_str(c)[0][0] for c in sorted({*ALPHABET, *string.printable[:95]})}
    single = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", *single])}
    merges: dict[tuple[str, str], None] = {}

    def join(left: str, right: str) -> None:
        if left in vocab and right in vocab:
            merges.setdefault((left, right))
            vocab.setdefault(left + right, len(vocab))

    for written in characters.values():
        for at in range(1, len(written)):
            join(written[:at], written[at])
    for left in characters.values():
        for right in characters.values():
            join(left, right)
    for left in "aZ1! \u00e9\u0301\n$":
        for byte in single:
            join(characters[left], byte)
            join(byte, characters[left])
    return vocab, [list(pair) for pair in merges]
