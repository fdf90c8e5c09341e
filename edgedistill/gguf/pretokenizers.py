"""Which of llama.cpp's pre-tokenizers cuts text as a tokenizer.json does: found by what it does to texts.

A pre-tokenizer can be written in many ways (one regex or several, `(?i:...)` or spelled out), so its words on
probing texts are compared, not its JSON. PRE_TOKENIZERS holds the original of each name as the model's authors
published it; tests/gguf/test_gguf_pretokenizers.py holds each of them to llama.cpp itself.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgedistill.errors import UserError

ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + TAIL
PATH_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + TAIL
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
# A word that may begin with capitals, and one of capitals alone: "camelCase" is two words.
CAPITALIZED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
CAPITALS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
GPT4O = rf"{CAPITALIZED}{ENDINGS}?|{CAPITALS}{ENDINGS}?|\p{{N}}{{1,3}}|{PATH_SIGNS}"
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + TAIL
)
DIGITS: dict[str, Any] = {"type": "Digits", "individual_digits": True}
GPT2: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ONLY: dict[str, Any] = {**GPT2, "use_regex": False}

# Its tables are those of Unicode 15.1, the tokenizers library's of 16: 4,382 letters and digits, 803 marks and signs.
NEW_CHARACTERS_NOTE = (
    "llama.cpp does not know the letters, digits, marks and signs that Unicode 16 added (Garay, Tulu-Tigalari, Todhri, "
    "Sunuwar, Gurung Khema, Kirat Rai, Ol Onal, Egyptian Hieroglyphs Extended-A, ...): text in them may differ"
)
CASE_NOTE = (
    "llama.cpp's '{name}' tells capitals from small letters for A-Z alone: words with other letters may be cut "
    "elsewhere where a small letter meets a capital"
)
MARKS_NOTE = CASE_NOTE + (
    ", and it takes no combining marks into a word: scripts written with marks (Devanagari, Thai, decomposed accents) "
    "may differ"
)
SPACES_NOTE = (
    "llama.cpp's '{name}' cuts at spaces that are not ASCII (U+3000, U+2028 and others) where the original does not"
)
PROBES = 2000
OWN_CONVERTER = "for another, give llama.cpp's own converter: --converter convert_hf_to_gguf.py"
# One of each kind that pre-tokenizers tell apart: letters by case and script, marks, digits, spaces, signs, the rest.
PROBE_CHARACTERS = (
    "aZ\u00e9\u00c9\u01c5\u02b0\u4f60\u3042\u30a2\ud55c\u0e01\u0915\u0940\u0301\u094d"
    "1\u0663\u00bd\u2167 \u00a0\u3000\t\n\r\u0085\u2028'strevlmdSLRM.,!?/-_$+<^`|~([\u2026\u3002\u060c\u00a8"
    "\U0001f642\u200d\u200b\ue000\u0378\u0001\u2581"
)
PROBE_TEXTS = (
    "I'm sure they've said we'll go; HE'S here, DON'T go, it`s o'clock, 'tis 'Twas 'LL 'lL.",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] << 2; } /* ok */\n\n\t// camelCase HTMLParser XMLhttp\r\n",
    "1 12 123 1234 12345 123456 1234567 3.14 \u0663\u0664\u0665\u0666 \u00bd\u00b2",
    "a" * 40 + "1" * 40 + " " * 600 + "x" + "\n" * 40 + "." * 40,
    "  lead  trail  \n \n\n  \t ",
)


@dataclass(frozen=True)
class PreTokenizer:
    """`original`: the pre-tokenizers of tokenizer.json, one after another. `ignores_merges`: a word that is a
    token is that token, whatever the merges make of it. `note`: where llama.cpp's own differs from `original`."""

    original: list[dict[str, Any]]
    ignores_merges: bool = False
    note: str = ""


def split(*regexes: str) -> list[dict[str, Any]]:
    cuts = [{"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False} for r in regexes]
    return [*cuts, BYTES_ONLY]


# llama.cpp's name (`tokenizer.ggml.pre`) → what it stands for. Of names that do the same, the first is taken.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer([GPT2]),
    "smollm": PreTokenizer([DIGITS, GPT2]),
    "llama-bpe": PreTokenizer(split(rf"{ENDINGS}|{LETTERS}|\p{{N}}{{1,3}}|{SIGNS}"), ignores_merges=True),
    "dbrx": PreTokenizer(split(rf"{ENDINGS}|{LETTERS}|\p{{N}}{{1,3}}|{SIGNS}")),
    "qwen2": PreTokenizer(split(rf"{ENDINGS}|{LETTERS}|\p{{N}}|{SIGNS}")),
    "qwen35": PreTokenizer(
        split(rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{TAIL}")
    ),
    "seed-coder": PreTokenizer(split(rf"{ENDINGS}|{LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{TAIL}")),
    "tekken": PreTokenizer(
        split(rf"{CAPITALIZED}|{CAPITALS}|\p{{N}}|{PATH_SIGNS}"), ignores_merges=True, note=MARKS_NOTE
    ),
    # Also as "gpt-4o", whose words leave out combining marks: this one differs from the original less often.
    "granite-embed-multi-97m": PreTokenizer(split(GPT4O), ignores_merges=True, note=CASE_NOTE),
    "gpt-4o": PreTokenizer(split(GPT4O), note=MARKS_NOTE),
    "minicpm5": PreTokenizer(split(r"\p{N}{1,3}", rf"{ENDINGS}|{LETTERS}|\p{{N}}+|{SIGNS}"), ignores_merges=True),
    "deepseek-v3": PreTokenizer(split(r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK3)),
    "deepseek-coder": PreTokenizer(
        [*split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")[:-1], DIGITS, BYTES_ONLY],
        note=SPACES_NOTE,
    ),
    "bloom": PreTokenizer(split(r" ?[^(\s|[.,!?…。，、।۔،])]+")),
}


@dataclass(frozen=True)
class Found:
    name: str
    notes: tuple[str, ...]


def find_pre_tokenizer(pre_tokenizer: Any, model: Mapping[str, Any], *, where: str) -> Found:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json with the byte-level BPE `model`.

    Raises UserError where none cuts every probing text into the same words, with the nearest and where they part.
    """
    cutter = _cutter(pre_tokenizer, where)
    alike = _alike(json.dumps(pre_tokenizer))
    if not alike:
        raise _unknown(cutter, where)
    ignores = bool(model.get("ignore_merges"))
    exact = [name for name in alike if PRE_TOKENIZERS[name].ignores_merges == ignores]
    unmerged = ""
    # Where the merges reach every word that is a token, following and ignoring them is the same, and the first of
    # all is right; a look at every token, so only where that would be gained.
    if alike[0] not in exact and (not exact or PRE_TOKENIZERS[alike[0]].note != PRE_TOKENIZERS[exact[0]].note):
        unmerged = _word_that_merges_miss(cutter, model)
        exact = exact if unmerged else list(alike)
    name = (exact or alike)[0]
    notes = [PRE_TOKENIZERS[name].note.format(name=name)] if PRE_TOKENIZERS[name].note else []
    if not exact:
        notes.append(
            f"llama.cpp's '{name}' {'ignores' if PRE_TOKENIZERS[name].ignores_merges else 'follows'} the merges for a "
            f"word that is a token of its own, such as {unmerged!r}; the original does not"
        )
    return Found(name, (*notes, NEW_CHARACTERS_NOTE))


@functools.cache
def probe_texts() -> tuple[str, ...]:
    """The same texts every time: a few written ones, then random strings over PROBE_CHARACTERS with repeats."""
    rng = random.Random(0)
    texts = list(PROBE_TEXTS)
    for _ in range(PROBES):
        runs = [rng.choice(PROBE_CHARACTERS) * rng.choice((1, 1, 1, 2, 3, 5)) for _ in range(rng.randint(1, 8))]
        texts.append("".join(runs))
    return tuple(texts)


@functools.lru_cache(maxsize=8)
def _alike(pre_tokenizer: str) -> tuple[str, ...]:
    """llama.cpp's names whose original cuts every probing text as the pre-tokenizer of this JSON does."""
    cutter = _cutter(json.loads(pre_tokenizer), "")
    return tuple(name for name in PRE_TOKENIZERS if _first_difference(cutter, name) is None)


def _first_difference(cutter: Any, name: str) -> str | None:
    """The first probing text that `cutter` cuts in another way than the original of llama.cpp's `name`."""
    known = _known_cutter(name)
    return next((t for t in probe_texts() if cutter.pre_tokenize_str(t) != known.pre_tokenize_str(t)), None)


@functools.cache
def _known_cutter(name: str) -> Any:
    return _cutter({"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[name].original}, name)


def _cutter(pre_tokenizer: Any, where: str) -> Any:
    from tokenizers import Tokenizer

    empty = {"type": "BPE", "vocab": {}, "merges": []}
    written = {"version": "1.0", "added_tokens": [], "pre_tokenizer": pre_tokenizer, "model": empty}
    try:
        cutter = Tokenizer.from_str(json.dumps(written)).pre_tokenizer
    # The library raises bare Exception for what it cannot read.
    except Exception as error:
        raise UserError(
            f"{where}: the tokenizers library cannot read its pre_tokenizer: {error}", "save the tokenizer again"
        ) from error
    if cutter is None:
        raise UserError(
            f"{where}: byte-level BPE without a pre_tokenizer", f"known: {', '.join(PRE_TOKENIZERS)}; {OWN_CONVERTER}"
        )
    return cutter


def _word_that_merges_miss(cutter: Any, model: Mapping[str, Any]) -> str:
    """A token that the pre-tokenizer can cut out as a word but the merges do not put together; "" if there is none."""
    from tokenizers import Tokenizer, decoders

    model = {**model, "ignore_merges": False}
    merging = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model})).model
    decoder = decoders.ByteLevel()
    for token, token_id in model["vocab"].items():
        if [t.id for t in merging.tokenize(token)] == [token_id]:
            continue
        text = decoder.decode([token])
        if [word for word, _ in cutter.pre_tokenize_str(text)] == [token]:
            return text
    return ""


def _unknown(cutter: Any, where: str) -> UserError:
    differing = {name: _first_difference(cutter, name) or "" for name in PRE_TOKENIZERS}
    nearest = max(differing, key=lambda name: probe_texts().index(differing[name]))
    text = differing[nearest]
    cut, known = ([text[a:b] for _, (a, b) in c.pre_tokenize_str(text)] for c in (cutter, _known_cutter(nearest)))
    return UserError(
        f"{where}: no pre-tokenizer of llama.cpp cuts text as this one does; the nearest, '{nearest}', cuts "
        f"{text[:40]!r} into {known[:6]}, this one into {cut[:6]}",
        f"known: {', '.join(PRE_TOKENIZERS)}; {OWN_CONVERTER}",
    )
