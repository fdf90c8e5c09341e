"""Folders of data: what is read is listed, what is left out is said, and a stray file moves no document."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from command import tiny_text

from edgedistill.config.recipe import Data
from edgedistill.data.documents import read_source
from edgedistill.data.prepare import prepare_data, read_part
from edgedistill.data.report import warnings
from edgedistill.errors import UserError
from edgedistill.records.data import DataResult
from edgedistill.store import Store, Stored


def rows(count: int = 60, word: str = "story") -> str:
    return "\n".join(json.dumps({"text": f"{word} {i} {'words ' * (i % 7)}"}) for i in range(count))


@pytest.fixture
def folder(tmp_path) -> Path:
    """One file of rows."""
    made = tmp_path / "texts"
    made.mkdir()
    (made / "t.jsonl").write_text(rows())
    return made


def stray(folder: Path, kind: str) -> str:
    """Something beside the data, as systems and people leave it there; what is said of it."""
    where = {
        "AppleDouble": "._t.jsonl", "notebook": ".ipynb_checkpoints/t-checkpoint.jsonl", "git": ".git/description.txt",
        "macosx": "__MACOSX/t.txt", "spark": "_delta_log/0.json",
        "store": ".DS_Store", "readme": "README.md", "license": "sub/LICENSE.txt",
        "picture": "a.jpg", "archive": "more.jsonl.bz2", "nothing": "notes", "card": "dataset_infos.json",
    }[kind]  # fmt: skip
    path = folder / where
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(
        b"\0\5\26\7" + bytes(60) if kind in ("AppleDouble", "store") else b"words that are not data\n" * 40
    )
    return {
        "readme": "describes the rows beside it: README.md", "license": "describes the rows beside it: sub/LICENSE.txt",
        "picture": "(.jpg): a.jpg", "archive": "(.bz2): more.jsonl.bz2", "nothing": "(no suffix): notes",
        "card": "describes a data set: dataset_infos.json",
    }.get(kind, f"hidden: {where.partition('/')[0]}")  # fmt: skip


STRAY = (
    "AppleDouble",
    "notebook",
    "git",
    "macosx",
    "spark",
    "store",
    "readme",
    "license",
    "picture",
    "archive",
    "nothing",
    "card",
)


def prepared(folder: Path, store: Path) -> Stored[DataResult]:
    return prepare_data(Data(source=str(folder), eval_share=0.2), store=Store(store))


@pytest.mark.parametrize("kind", STRAY)
def test_what_is_stray_changes_nothing_and_is_said(folder, tmp_path, kind):
    before = prepared(folder, tmp_path / "store")
    said = stray(folder, kind)
    after = prepared(folder, tmp_path / "store")
    assert after.reused and after.key == before.key and after.result.parts == before.result.parts
    [found] = after.result.read
    assert [Path(file.path).name for file in found.files] == ["t.jsonl"] and (found.rows, found.documents) == (60, 60)
    assert said in "; ".join(f"{entry.why}: {', '.join(entry.paths)}" for entry in found.left_out)


@pytest.mark.parametrize("name", ["more.jsonl", "notes.txt", "a/first.csv"])
def test_a_file_that_is_added_moves_no_document_of_another(folder, tmp_path, name):
    (folder / "story.txt").write_text(tiny_text())
    before = prepared(folder, tmp_path / "one")
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        {".jsonl": rows(9, "other"), ".txt": "a line\n\nof notes\n", ".csv": "text\none\ntwo\n"}[path.suffix]
    )
    after = prepared(folder, tmp_path / "two")
    for part in before.result.parts:
        blocks = read_part(after.directory, part)
        assert all(block in blocks for block in read_part(before.directory, part))


def test_texts_are_running_and_rows_are_not_each_by_its_own_file(folder):
    (folder / "story.txt").write_text("one\ntwo\nthree")
    assert [group.running for group in read_source(str(folder), Data()).groups] == [True, False]


def test_a_readme_among_texts_is_a_text(tmp_path):
    for name in ("README.md", "guide.md"):
        (tmp_path / name).write_text(f"The words of {name}.\n")
    assert len(read_source(str(tmp_path), Data()).texts) == 2


def test_linked_folders_are_read_once(folder, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "more.csv").write_text("text\none\ntwo\n")
    (other / "back").symlink_to(folder)
    (folder / "link").symlink_to(other)
    (folder / "twice").symlink_to(other)
    (folder / "round").symlink_to(folder)
    (folder / "up").symlink_to(tmp_path)
    (folder / "sub").mkdir()
    (folder / "sub" / "own.txt").write_text("a line")
    (folder / "to-sub").symlink_to(folder / "sub")
    found = read_source(str(folder), Data()).read
    assert found is not None
    names = [str(Path(file.path).relative_to(folder)) for file in found.files]
    assert names == ["link/more.csv", "sub/own.txt", "t.jsonl"]
    left = {entry.why: entry.paths for entry in found.left_out}
    assert left == {
        "a link to a folder that is read already": ["link/back", "round", "to-sub", "twice"],
        "a link to a folder around it": ["up"],
    }


def test_names_that_mislead(tmp_path):
    """A folder called as a file, a file called as nothing but its suffix, upper case."""
    book = tmp_path / "chapter.txt"
    (book / "one.jsonl").mkdir(parents=True)
    (book / "one.jsonl" / "T.TXT").write_text("first\nsecond")
    (book / "part.JSONL.GZ").write_bytes(gzip.compress(rows(3).encode()))
    assert len(read_source(str(book), Data()).texts) == 5
    (tmp_path / ".jsonl").write_text(rows(3))
    assert len(read_source(str(tmp_path / ".jsonl"), Data()).texts) == 3


def test_an_empty_file_among_others_is_said(folder):
    (folder / "empty.txt").write_text("")
    (folder / "blank.csv").write_text("text\n")
    found = read_source(str(folder), Data()).read
    assert found is not None and [file.documents for file in found.files] == [0, 0, 60]


@pytest.mark.parametrize(
    ("names", "cause", "remedy"),
    [
        ([], "holds no text", ".jsonl"),
        ([".hidden.txt"], "holds no text: 1 hidden", ".jsonl"),
        (["a", "b", "c.xml"], "2 of a kind that is not read (no suffix)", "names the file itself"),
    ],
)
def test_a_folder_without_text(tmp_path, names, cause, remedy):
    for name in names:
        (tmp_path / name).write_text("some words")
    with pytest.raises(UserError) as error:
        read_source(str(tmp_path), Data())
    assert cause in error.value.cause and remedy in error.value.remedy


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        (("train.jsonl", "test.jsonl"), "test.jsonl"),
        (("train-0.jsonl", "train-1.jsonl", "validation-0.jsonl"), "validation-0.jsonl"),
        (("train/a.jsonl", "dev/a.jsonl"), "dev/a.jsonl"),
        (("train.jsonl", "latest.jsonl", "evaluation-of-trains.jsonl"), None),
        (("test-a.jsonl", "test-b.jsonl"), None),
    ],
)
def test_a_test_part_beside_a_training_part_is_a_warning(tmp_path, names, warned):
    """All of a folder is one text: what is called a test would be trained on."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(rows(3, name))
    found = read_source(str(tmp_path), Data()).read
    assert found is not None
    said = [warning for warning in warnings(found) if "--eval-data" in warning]
    assert len(said) == (warned is not None) and all(f"({warned})" in warning for warning in said)


def test_names_that_are_no_text(tmp_path):
    """Bytes of another encoding, and control characters, in names: read, and shown as any terminal prints it."""
    for name in (b"caf\xe9.txt", b"\x1b[31m.txt", b"a\nb.txt"):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_text(f"words {len(name)}")
    found = read_source(str(tmp_path), Data()).read
    assert found is not None and found.documents == 3
    assert all(file.path.isprintable() and file.path.encode() for file in found.files)
    assert found.model_dump_json()
