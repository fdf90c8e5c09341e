"""WordPiece inside a GGUF, run by llama.cpp, against the tokenizers library: equal but for the listed classes."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from checkpoints import edit_json
from vocabularies import ASSIGNED_UP_TO, differing, every_character, has_category, random_texts, vocabulary_in_llama_cpp

from edgedistill.errors import UserError
from edgedistill.gguf.tokenizer import read_tokenizer
from edgedistill.gguf.tokenizer_wordpiece import CASE_NOTE, CONTROLS_NOTE, HANGUL_NOTE, MARKS_NOTE

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ENGLISH = (
    "The quick brown fox isn't lazy: naïve café, Ångström & Straße — 12,345.67 €! 你好 世界; привет, мир?",
    "unaffable unbelievable [MASK] [CLS] in the [SEP] middle https://example.org/a?b=c",
    "  spaces\tand\nlines  ",
    "",
)


def wordpiece(folder: Path, pieces: list[str], *, lowercase: bool = True, strip: bool | None = None) -> int:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocab = {token: i for i, token in enumerate(dict.fromkeys([*SPECIAL, *pieces]))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return len(vocab)


def every_piece(last: int = ASSIGNED_UP_TO) -> list[str]:
    """Each character as a word's beginning and as its going on: no difference hides behind [UNK]."""
    characters = [c for c in every_character(last) if c > " " and c != "\u2581" and unicodedata.category(c) != "Cc"]
    return [piece for c in characters for piece in (c, f"##{c}")]


def hangul(text: str) -> bool:
    return any("\uac00" <= c <= "\ud7a3" for c in text)


def marks(text: str) -> bool:
    return has_category(unicodedata.normalize("NFD", text), "Mc", "Me")


def controls_or_new(text: str) -> bool:
    """The characters of CONTROLS_NOTE; the newer ones only as far as they are marks, signs or letters with case."""
    if any(c in "\x0b\x0c\x85\u2581\u166d\u1885\u1886" for c in text):
        return True
    fresh = [c for c in text if not 0xE000 <= ord(c) <= 0xF8FF and unicodedata.category(c) in KINDS]
    old = unicodedata.ucd_3_2_0
    return any(old.category(c) == "Cn" for c in fresh)


KINDS = ("Mn", "Po", "Ps", "Pe", "Pd", "Cf", "Cn", "Lu")


@pytest.mark.parametrize(("lowercase", "strip"), [(True, None), (False, None), (True, False)])
def test_every_character(lowercase: bool, strip: bool | None, tmp_path: Path) -> None:
    """Nothing but the classes that the notes name differs, and each of them does."""
    last = ASSIGNED_UP_TO if strip is None else 0x10000
    size = wordpiece(tmp_path, every_piece(last), lowercase=lowercase, strip=strip)
    notes = read_tokenizer(tmp_path, vocab_size=size).notes
    strips = lowercase and strip is None
    named = [HANGUL_NOTE, MARKS_NOTE, CONTROLS_NOTE] if strips else [CONTROLS_NOTE]
    assert [n for n in notes if "longest word" not in n] == [*named, *([CASE_NOTE] if lowercase and not strips else [])]
    with vocabulary_in_llama_cpp(tmp_path, size) as runtime:
        wrong = {text[1] for text in differing(tmp_path, runtime, [f"a{c}b" for c in every_character(last)])}
    rest = {c for c in wrong if not (strips and (hangul(c) or marks(c)))}
    assert {c for c in rest if not controls_or_new(c)} == ({"\u0130"} if lowercase and not strips else set())
    assert {"\x0b", "\x0c", "\x85", "\u2e43"} <= rest
    if strips:
        assert {c for c in every_character() if hangul(c)} <= wrong
        scripts = {"DEVANAGARI", "BENGALI", "GURMUKHI", "GUJARATI", "ORIYA", "TAMIL", "TELUGU", "KANNADA", "MALAYALAM"}
        scripts |= {"SINHALA", "KHMER", "MYANMAR", "JAVANESE", "BALINESE"}
        assert scripts <= {unicodedata.name(c, "?").split()[0] for c in wrong if marks(c)}
        assert not scripts & {unicodedata.name(c, "?").split()[0] for c in rest if not controls_or_new(c)}


@pytest.mark.parametrize("lowercase", [True, False])
def test_random_and_english_texts(lowercase: bool, tmp_path: Path) -> None:
    size = wordpiece(
        tmp_path, [*every_piece(0x3000), "the", "un", "##aff", "##able", "qui", "##ck"], lowercase=lowercase
    )
    listed = (hangul, marks, controls_or_new)
    with vocabulary_in_llama_cpp(tmp_path, size) as runtime:
        for specials in (False, True):
            assert differing(tmp_path, runtime, ENGLISH, specials=specials) == []
            wrong = differing(tmp_path, runtime, random_texts(), specials=specials)
            assert [t for t in wrong if not any(known(t) for known in listed)] == []
        assert wrong
        assert differing(tmp_path, runtime, ENGLISH, plain=True) == []
        assert runtime.tokenize("", add_special=True) == [2, 3]
        assert differing(tmp_path, runtime, ["a" * 100, "a" * 101]) == ["a" * 101]


def test_bge_on_llama_cpp_s_own_texts(test_data: Path, tmp_path: Path) -> None:
    """BGE's vocabulary as a Hugging Face tokenizer: its ids, ours in llama.cpp and llama.cpp's own vectors agree."""
    from gguf import GGUFReader

    stem = test_data / "tokenizers" / "llamacpp" / "ggml-vocab-bert-bge.gguf"
    field = GGUFReader(stem).fields["tokenizer.ggml.tokens"]
    tokens = [bytes(field.parts[i]).decode() for i in field.data]
    pieces = [
        t if t in SPECIAL or t.startswith("[unused") else t[1:] if t.startswith("\u2581") else f"##{t}" for t in tokens
    ]
    size = wordpiece(tmp_path, pieces)
    edit_json(tmp_path / "tokenizer.json", **reordered(tmp_path / "tokenizer.json", pieces))
    assert size == len(tokens) == 30522
    texts = Path(f"{stem}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{stem}.out").read_text(encoding="utf-8").splitlines()
    vectors = [[int(t) for t in line.split()] for line in lines]
    assert len(texts) >= len(vectors) > 40
    with vocabulary_in_llama_cpp(tmp_path, size) as runtime:
        assert differing(tmp_path, runtime, texts) == []
        assert differing(tmp_path, runtime, texts, specials=True) == []
        assert runtime.tokenize_many(texts[: len(vectors)], add_special=False) == vectors
        assert runtime.tokenize("hello", add_special=True) == [101, 7592, 102]


def reordered(path: Path, pieces: list[str]) -> dict[str, Any]:
    """The same tokenizer with the ids that the pieces have in their list."""
    tokenizer = json.loads(path.read_text())
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer["model"]["vocab"] = vocab
    for added in tokenizer["added_tokens"]:
        added["id"] = vocab[added["content"]]
    tokenizer["added_tokens"].sort(key=lambda a: a["id"])
    for name, special in tokenizer["post_processor"]["special_tokens"].items():
        special["ids"] = [vocab[name]]
    return tokenizer


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"normalizer": None}, "normalizer None"),
        (
            {"normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": False}},
            "without handle",
        ),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer Whitespace"),
        ({"post_processor": None}, "before and after every text"),
    ],
)
def test_other_wordpieces_are_refused(change: dict[str, Any], cause: str, tmp_path: Path) -> None:
    size = wordpiece(tmp_path, ["a", "##b"])
    edit_json(tmp_path / "tokenizer.json", **change)
    with pytest.raises(UserError, match=cause) as caught:
        read_tokenizer(tmp_path, vocab_size=size)
    assert "WordPiece as in BERT" in caught.value.remedy


def test_pieces_that_llama_cpp_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    size = wordpiece(tmp_path, ["a", "##\u2581a"])
    with pytest.raises(UserError, match="which is taken or empty"):
        read_tokenizer(tmp_path, vocab_size=size)


def test_roles_and_ends(tmp_path: Path) -> None:
    size = wordpiece(tmp_path, ["a", "##b"])
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]", "cls_token": "[CLS]"})
    )
    found = read_tokenizer(tmp_path, vocab_size=size)
    assert found.tokens[5:] == ["\u2581a", "b"]
    assert found.special == {"bos": 2, "seperator": 3, "unknown": 1, "padding": 0, "mask": 4}
    assert found.extra["add_sep_token"] is True
    edit_json(
        tmp_path / "tokenizer.json", post_processor={"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    )
    assert read_tokenizer(tmp_path, vocab_size=size).special == found.special
