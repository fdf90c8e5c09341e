"""Pre-tokenizers recognised by what they do, and each of llama.cpp's held to the original, in llama.cpp."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vocabularies import (
    NEW_SIGNS,
    boundary_bpe,
    differing,
    every_character,
    has_category,
    random_texts,
    unknown_to_llama_cpp,
    vocabulary_in_llama_cpp,
)  # fmt: skip

from edgedistill.errors import UserError
from edgedistill.gguf import pretokenizers
from edgedistill.gguf.pretokenizers import (
    BYTES_ONLY,
    DIGITS,
    GPT2,
    NEW_CHARACTERS_NOTE,
    PRE_TOKENIZERS,
    find_pre_tokenizer,
    split,
)  # fmt: skip
from edgedistill.gguf.tokenizer import read_tokenizer

LLAMA3 = (
    r"(?:'[sS\u017f]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PUNCTUATION = {"type": "Punctuation", "behavior": "Isolated"}


def sequence(*parts: Any) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def model(**changes: Any) -> dict[str, Any]:
    return {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], **changes}


def letters_with_case(text: str) -> bool:
    return any(c > "\x7f" and unicodedata.category(c) in ("Lu", "Lt", "Ll") for c in text)


def letters_with_case_or_marks(text: str) -> bool:
    return letters_with_case(text) or has_category(text, "Mn", "Mc", "Me")


def other_spaces(text: str) -> bool:
    return any(c.isspace() and c > "\x7f" for c in text)


# Where llama.cpp itself differs from the original: what the note says, and no more.
DIFFERING: dict[str, Callable[[str], bool]] = {
    "tekken": letters_with_case_or_marks,
    "gpt-4o": letters_with_case_or_marks,
    "granite-embed-multi-97m": letters_with_case,
    "deepseek-coder": other_spaces,
}
TELLING_SIGNS_APART = ("deepseek-v3", "qwen35")


def other_or_new(name: str) -> Callable[[str], bool]:
    if name in TELLING_SIGNS_APART:
        return lambda text: unknown_to_llama_cpp(text, *NEW_SIGNS)
    return DIFFERING.get(name, lambda _: False)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_llama_cpp_cuts_as_the_original(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 10,000 random texts (2,500 where llama.cpp has nothing but std::regex for it, which is slow)."""
    known = PRE_TOKENIZERS[name]
    size = boundary_bpe(tmp_path, sequence(*known.original), ignore_merges=known.ignores_merges)
    # Two names share a regex: each is tried by itself.
    monkeypatch.setattr(pretokenizers, "PRE_TOKENIZERS", {name: known})
    monkeypatch.setattr(pretokenizers, "_alike", pretokenizers._alike.__wrapped__)  # which remembers the whole table's
    found = read_tokenizer(tmp_path, vocab_size=size)
    assert (found.pre, found.notes) == (name, [n for n in (known.note.format(name=name), NEW_CHARACTERS_NOTE) if n])
    texts = random_texts()[: 10_000 if name in ("gpt-2", "smollm", "llama-bpe", "qwen2") else 2500]
    with vocabulary_in_llama_cpp(tmp_path, size) as runtime:
        wrong = [t for t in differing(tmp_path, runtime, texts) if not unknown_to_llama_cpp(t)]
    assert [t for t in wrong if not other_or_new(name)(t)] == []
    assert bool(known.note) == (name in DIFFERING)
    assert wrong or name not in DIFFERING


def test_the_characters_that_llama_cpp_does_not_know(tmp_path: Path) -> None:
    """Every character of Unicode is of the same kind to both, but for the listed ones, which all differ."""
    size = boundary_bpe(tmp_path, GPT2)
    with vocabulary_in_llama_cpp(tmp_path, size) as runtime:
        wrong = differing(tmp_path, runtime, [f"a{c}!" for c in every_character()])
    assert [text[1] for text in wrong] == [c for c in every_character() if unknown_to_llama_cpp(c)]
    assert len(wrong) == 4382


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (sequence(*split(LLAMA3)), "dbrx"),
        (sequence(*split(GPT2_REGEX)), "gpt-2"),
        (sequence(sequence(GPT2)), "gpt-2"),
        (sequence(*split(r"\p{N}", GPT2_REGEX)), "smollm"),
        (sequence(DIGITS, *split(GPT2_REGEX)[:1], BYTES_ONLY), "smollm"),
    ],
)
def test_recognised_however_it_is_written(written: Any, name: str) -> None:
    assert find_pre_tokenizer(written, model(), where="tokenizer.json").name == name


@pytest.mark.parametrize(
    ("written", "nearest"),
    [
        (sequence(*split(LLAMA3.replace("{1,3}", "{1,2}"))), "llama-bpe"),
        (sequence(*split(LLAMA3.replace(r"[\r\n]*|", "|"))), ""),
        (sequence(*split(GPT2_REGEX.replace("'s|", ""))), "gpt-2"),
        (sequence(*split(r"\p{N}", LLAMA3.replace("{1,3}", "+"))), "qwen2"),
        (sequence(PUNCTUATION, GPT2), ""),
        (GPT2 | {"add_prefix_space": True}, ""),
        (BYTES_ONLY, ""),
        ({"type": "Whitespace"}, ""),
    ],
)
def test_near_misses_are_refused(written: Any, nearest: str) -> None:
    with pytest.raises(UserError, match=f"no pre-tokenizer of llama.cpp.*nearest, '{nearest}") as caught:
        find_pre_tokenizer(written, model(), where="tokenizer.json")
    assert "qwen2" in caught.value.remedy
    assert "--converter" in caught.value.remedy


def test_no_or_an_unreadable_pre_tokenizer() -> None:
    with pytest.raises(UserError, match="without a pre_tokenizer"):
        find_pre_tokenizer(None, model(), where="tokenizer.json")
    with pytest.raises(UserError, match="cannot read its pre_tokenizer"):
        find_pre_tokenizer({"type": "Nonsense"}, model(), where="tokenizer.json")


def test_ignored_merges_matter_only_where_they_miss_a_word() -> None:
    """GPT-4o's regex has two names: the one that follows its marks is taken wherever its merges reach every word."""
    gpt4o = sequence(*PRE_TOKENIZERS["gpt-4o"].original)
    assert find_pre_tokenizer(gpt4o, model(), where="x").name == "granite-embed-multi-97m"
    missed = model(vocab={"a": 0, "b": 1, "ab": 2, "abb": 3})
    assert find_pre_tokenizer(gpt4o, missed, where="x").name == "gpt-4o"
    assert find_pre_tokenizer(gpt4o, missed | {"ignore_merges": True}, where="x").name == "granite-embed-multi-97m"
    tekken = sequence(*PRE_TOKENIZERS["tekken"].original)
    assert len(find_pre_tokenizer(tekken, model(), where="x").notes) == 2
    assert any("ignores the merges" in n and "'abb'" in n for n in find_pre_tokenizer(tekken, missed, where="x").notes)
