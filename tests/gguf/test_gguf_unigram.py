"""SentencePiece's unigram inside a GGUF, run by llama.cpp, against the tokenizers library."""

from __future__ import annotations

import base64
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CORPUS, edit_json
from vocabularies import differing, every_character, random_texts, vocabulary_in_llama_cpp

from edgedistill.errors import UserError
from edgedistill.gguf.tokenizer import read_tokenizer
from edgedistill.gguf.tokenizer_unigram import CLUSTERS_NOTE

STRIP = {"type": "Strip", "strip_left": False, "strip_right": True}
SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
WHITESPACE = {"type": "WhitespaceSplit"}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
MODEL = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]]}
# Joined to the character before them by the original, which then replaces both; so are joiners and Hangul letters.
FIRST_PLANE = 0x10000
SPECIAL: list[list[Any]] = [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0]]
JOINED = ("Mn", "Mc", "Me")


def unigram(folder: Path, pieces: list[list[Any]], *, charsmap: bytes = b"", **changes: Any) -> int:
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    mapped = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": t, **special} for i, t in enumerate(("<unk>", "<s>", "</s>"))],
        "normalizer": {"type": "Sequence", "normalizers": [*([mapped] if charsmap else []), STRIP, SPACES]},
        "pre_tokenizer": METASPACE,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, end, {"Sequence": {"id": "B", "type_id": 0}}, end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}},
        },
        "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False},
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return len(pieces)


def trained() -> list[list[Any]]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    pieces: list[list[Any]] = json.loads(tokenizer.to_str())["model"]["vocab"]
    return pieces


def sentencepiece(test_data: Path) -> tuple[list[list[Any]], bytes]:
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    model.ParseFromString((test_data / "tokenizers" / "sentencepiece" / "test_model.model").read_bytes())
    return [[p.piece, p.score] for p in model.pieces], model.normalizer_spec.precompiled_charsmap


def marked_or_ending(text: str) -> bool:
    """U+2581, and white space other than spaces at the end."""
    return "\u2581" in text or (text != text.rstrip().rstrip(" ") and text.rstrip(" ") != text.rstrip())


def clusters(text: str) -> bool:
    return any(
        unicodedata.category(c) in JOINED
        or c in "\u200c\u200d"
        or 0x1F3FB <= ord(c) <= 0x1F3FF
        or "\u1100" <= c <= "\u11ff"
        for c in text
    )


def test_without_a_character_map(tmp_path: Path) -> None:
    size = unigram(tmp_path, trained())
    found = read_tokenizer(tmp_path, vocab_size=size)
    assert (found.model, found.special, found.add_bos, found.add_eos) == ("t5", {"unknown": 0, "eos": 2}, False, True)
    assert CLUSTERS_NOTE not in found.notes
    with vocabulary_in_llama_cpp(tmp_path, size) as runtime:
        for specials in (False, True):
            assert (
                differing(tmp_path, runtime, [*CORPUS, "", " a", "a ", "a  b", "</s> a<s>b"], specials=specials) == []
            )
            wrong = differing(tmp_path, runtime, random_texts(), specials=specials)
            assert [t for t in wrong if not marked_or_ending(t)] == []
        assert differing(tmp_path, runtime, ["a\n", "\u2581a"]) == ["a\n", "\u2581a"]


def test_sentencepiece_s_own(test_data: Path, tmp_path: Path) -> None:
    """SentencePiece's test model with its NFKC map: its book, llama.cpp's 46 texts, random texts by class."""
    pieces, charsmap = sentencepiece(test_data)
    size = unigram(tmp_path, pieces, charsmap=charsmap)
    assert CLUSTERS_NOTE in read_tokenizer(tmp_path, vocab_size=size).notes
    book = (test_data / "tokenizers" / "sentencepiece" / "botchan.txt").read_text(encoding="utf-8").splitlines()
    vectors = test_data / "tokenizers" / "llamacpp" / "ggml-vocab-gpt-2.gguf.inp"
    texts = vectors.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    assert len(book) > 4000
    assert len(texts) > 40
    with vocabulary_in_llama_cpp(tmp_path, size) as runtime:
        assert differing(tmp_path, runtime, book, specials=True) == []
        assert [t for t in differing(tmp_path, runtime, texts) if not marked_or_ending(t)] == []
        wrong = differing(tmp_path, runtime, random_texts())
        assert [t for t in wrong if not marked_or_ending(t) and not clusters(t)] == []
        assert any(clusters(t) for t in wrong)


def test_every_character(test_data: Path, tmp_path: Path) -> None:
    """With a piece for each character none differs, but with a mark behind it the replaced ones do: CLUSTERS_NOTE."""
    _, charsmap = sentencepiece(test_data)
    pieces = [*SPECIAL, *([c, -5.0 - ord(c) % 7] for c in every_character(FIRST_PLANE) if c > " ")]
    size = unigram(tmp_path, pieces, charsmap=charsmap)
    with vocabulary_in_llama_cpp(tmp_path, size) as runtime:
        assert differing(tmp_path, runtime, [f"a{c}b" for c in every_character(FIRST_PLANE)]) == []
        wrong = {t[1] for t in differing(tmp_path, runtime, [f"a{c}\u0301b" for c in every_character(FIRST_PLANE)])}
    assert {"\u02b0", "\u2460", "\ufb01"} <= wrong
    unmapped = {c for c in wrong if unicodedata.normalize("NFKC", c) == c and unicodedata.category(c) != "Cn"}
    assert {c for c in unmapped if not clusters(c)} == set()


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"normalizer": SPACES}, "drops spaces at the end"),
        ({"normalizer": STRIP}, "one more space before"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [WHITESPACE, METASPACE]}},
            "line ends",
        ),
    ],
)
def test_other_ways_with_spaces(change: dict[str, Any], note: str, tmp_path: Path) -> None:
    size = unigram(tmp_path, trained(), **change)
    assert any(note in n for n in read_tokenizer(tmp_path, vocab_size=size).notes)
    plain = [line for line in CORPUS if "\n" not in line and "  " not in line]
    assert plain
    with vocabulary_in_llama_cpp(tmp_path, size) as runtime:
        assert differing(tmp_path, runtime, plain, specials=True) == []
        probes = ["the ", " the", "the\n", "a\nthe"]
        assert differing(tmp_path, runtime, probes) != []


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "a Lowercase normalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"pre-tokenizer \['Whitespace'\]"),
        (
            {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]], "byte_fallback": True}},
            "byte fallback",
        ),
        ({"model": MODEL | {"vocab": []}}, "without pieces"),
        (
            {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a\u2581b", 0.0]]}},
            "a Metaspace that splits",
        ),
    ],
)
def test_other_unigrams_are_refused(change: dict[str, Any], cause: str, tmp_path: Path) -> None:
    unigram(tmp_path, trained())
    edit_json(tmp_path / "tokenizer.json", **change)
    with pytest.raises(UserError, match=cause):
        read_tokenizer(tmp_path, vocab_size=400)
