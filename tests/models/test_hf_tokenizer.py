"""What is made of a tokenizer.json once for the same bytes: the file decides each time, never its name or its times."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from edgedistill.errors import UserError
from edgedistill.models import hf_tokenizer
from edgedistill.models.hf_tokenizer import CONTENTS_KEPT, open_for_text, open_tokenizer, tokenizer_tree, vocabulary


def write(folder: Path, *tokens: str) -> Path:
    """A tokenizer.json of these tokens; the file's times stay the same."""
    path = folder / "tokenizer.json"
    Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0])).save(str(path))
    os.utime(path, (1, 1))
    return path


def test_other_bytes_under_the_same_name_size_and_times_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, "a", "b")
    before = (vocabulary(tmp_path), tokenizer_tree(path), open_for_text(path).get_vocab())
    write(tmp_path, "a", "c")
    assert vocabulary(tmp_path) == {"a": 0, "c": 1} == tokenizer_tree(path)["model"]["vocab"]
    assert open_for_text(path).get_vocab() == {"a": 0, "c": 1}
    assert before[0] == {"a": 0, "b": 1} == before[1]["model"]["vocab"] == before[2]


def test_the_same_bytes_are_parsed_once_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    read = hf_tokenizer.json_object_of
    monkeypatch.setattr(hf_tokenizer, "json_object_of", lambda *a, **k: parsed.append(a[1]) or read(*a, **k))
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        write(folder, "once", "more" if number < 2 else "less")
    for _ in range(3):
        for folder in folders:
            vocabulary(folder)
            tokenizer_tree(folder / "tokenizer.json")
    assert len(parsed) == 2 == CONTENTS_KEPT


def test_a_vocabulary_is_the_callers_own(tmp_path: Path) -> None:
    write(tmp_path, "mine", "yours")
    vocabulary(tmp_path).clear()
    assert vocabulary(tmp_path) == {"mine": 0, "yours": 1}


def test_what_cannot_be_read_is_refused_each_time(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": {"vocab": {"a": "x"}}}')
    for _ in range(2):
        with pytest.raises(UserError, match="no vocabulary that can be read"):
            vocabulary(tmp_path)
    path.write_text('{"a": 1, "a": 2}')
    for _ in range(2):
        with pytest.raises(UserError, match="twice"):
            tokenizer_tree(path)


BROKEN: list[Any] = [
    b"",
    b"{",
    b"{}",
    b"[1]",
    b"\xff\xfe",
    b'{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}',
]


@pytest.mark.parametrize("raw", BROKEN)
def test_an_error_is_the_librarys_either_way(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(raw)
    said = []
    for opened in (open_tokenizer, open_for_text):
        with pytest.raises(UserError) as refused:
            opened(path)
        said.append(str(refused.value))
    assert said[0] == said[1]


def test_what_spells_a_special_token_is_text(tmp_path: Path) -> None:
    path = write(tmp_path, "x", "y")
    tree = json.loads(path.read_text()) | {"truncation": {"max_length": 1, "stride": 0, "strategy": "LongestFirst",
                                                          "direction": "Right"}}  # fmt: skip
    path.write_text(json.dumps(tree))
    opened = open_for_text(path)
    assert opened.encode_special_tokens and opened.truncation is None
    assert not open_tokenizer(path).encode_special_tokens
