"""Text in, three parts out."""

from __future__ import annotations

import argparse
import ast
import json
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.config.recipe import Data
from edgedistill.data.documents import Group, read_documents, read_source
from edgedistill.data.prepare import prepare_data, read_part
from edgedistill.data.python_docs import _documented, python_docs
from edgedistill.data.split import blocks_of, overlap, split_documents
from edgedistill.data.text import cut_text
from edgedistill.errors import UserError
from edgedistill.store import Store


@pytest.mark.parametrize(
    ("text", "separator", "expected"),
    [
        ("a\nb\n\nc\nd\n\ne\n", None, ["a\nb", "c\nd", "e"]),
        ("a\n\nb\nc\n\nd\n\ne\n", None, ["a", "b", "c", "d", "e"]),
        ("a\nb\nc", None, ["a", "b", "c"]),
        ("a\nb\nc\n", None, ["a", "b", "c"]),
        ("\n\na\n \nb\n\n\n", None, ["a", "b"]),
        ("one<|end|>two<|end|>", "<|end|>", ["one", "two"]),
        ("one\n---\ntwo", "\\n---\\n", ["one", "two"]),
    ],
)
def test_documents_of_a_text(text, separator, expected):
    assert cut_text(text, separator).documents == expected


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "is empty"),
        (b" \n\n ", "is empty"),
        (b"\x00\x01\x02\xff\xfe" * 100, "is binary"),
        (b"\x7fELF" + bytes(range(32)) * 50, "is binary"),
        ("naïve café".encode("latin-1"), "is not UTF-8: byte 2 is 0xef"),
        ("text".encode("utf-16"), "UTF-16"),
    ],
)
def test_files_that_are_no_text(tmp_path, content, cause):
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_documents(str(path), Data())
    assert cause in error.value.cause
    assert str(path) in error.value.cause
    assert error.value.remedy


def test_a_byte_order_mark_and_crlf_are_fine(tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
    assert read_documents(str(path), Data()) == ["one", "two"]


def test_jsonl_csv_and_folders(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"row {i}", "n": i}) + "\n" for i in range(3)))
    (tmp_path / "b.csv").write_text("text,label\nhello,1\nworld,2\n")
    (tmp_path / "c.txt").write_text("plain\n\ntext")
    assert read_documents(str(tmp_path / "a.jsonl"), Data()) == ["row 0", "row 1", "row 2"]
    assert read_documents(str(tmp_path), Data()) == ["row 0", "row 1", "row 2", "hello", "world", "plain", "text"]
    with pytest.raises(UserError, match=r"no column 'body'.*text"):
        read_documents(str(tmp_path / "a.jsonl"), Data(text_column="body"))
    with pytest.raises(UserError, match="holds int"):
        read_documents(str(tmp_path / "a.jsonl"), Data(text_column="n"))


@pytest.mark.parametrize("content", ['{"text": ', "not json at all", '{"text": "a"}\n{"text": [1]}\n'])
def test_broken_jsonl(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_documents(str(path), Data())
    assert str(path) in error.value.cause


def test_missing_files():
    for source in ("./nothing.txt", "/nowhere/at/all", "nothing.jsonl"):
        with pytest.raises(UserError, match="no data file"):
            read_documents(source, Data())


def documents(count: int = 200) -> list[str]:
    return [f"document number {i} " + " ".join(f"w{i}x{j}" for j in range(40)) for i in range(count)]


@pytest.mark.parametrize("split", ["hash", "tail"])
def test_parts_are_disjoint_and_whole(split):
    texts = documents()
    made = split_documents(
        [Group(texts)], Data(split=split, min_document_chars=0, eval_share=0.1, calibration_share=0.1)
    )
    together = [t for part in made.parts.values() for block in part for t in block]
    assert sorted(together) == sorted(texts)
    assert made.overlap["documents_in_both"] == 0
    for name in ("held_out", "calibration"):
        assert 0.04 < len(made.parts[name]) / len(texts) < 0.18


def test_hash_split_moves_no_document_when_others_are_added():
    ask = Data(min_document_chars=0, eval_share=0.2)
    small, large = (split_documents([Group(documents(count))], ask) for count in (150, 200))
    for name in small.parts:
        assert {b[0] for b in small.parts[name]} <= {b[0] for b in large.parts[name]}


def test_tail_holds_out_the_end_and_never_more_lines_than_its_share():
    texts = ["one line"] * 0 + [f"line {i}\nsecond {i}" if i % 3 else f"line {i}" for i in range(100)]
    made = split_documents([Group(texts)], Data(split="tail", min_document_chars=0, eval_share=0.1))
    held = [t for block in made.parts["held_out"] for t in block]
    assert texts[-len(held) :] == held
    lines = sum(t.count("\n") + 1 for t in texts)
    assert sum(t.count("\n") + 1 for t in held) <= 0.1 * lines
    assert texts.index(made.parts["calibration"][-1][-1]) + 1 == texts.index(held[0])


def test_duplicates_are_dropped_and_shared_text_is_reported():
    shared = " ".join(f"common{j}" for j in range(30))
    held_out = [documents()[3], f"only here {shared}", "quite new " + " ".join(f"z{j}" for j in range(30))]
    train = [*documents(), documents()[0], f"in training {shared}"]
    made = split_documents([Group(train)], Data(min_document_chars=0), [Group(held_out)])
    assert made.duplicates_dropped == 1
    assert made.parts["held_out"] == [[text] for text in held_out]
    assert made.overlap["documents_sharing_13_words"] >= 1
    assert made.overlap["documents_in_both"] == 0
    assert made.overlap["left_out_of_training"] == 1
    trained_on = [t for name in ("train", "calibration") for block in made.parts[name] for t in block]
    assert held_out[0] not in trained_on and f"in training {shared}" in trained_on
    assert overlap([held_out[0]], held_out)["documents_in_both"] == 1
    assert overlap(["nothing alike"], held_out)["documents_in_both"] == 0


@pytest.mark.parametrize("change", [lambda text: text, lambda text: f"{text} ", lambda text: f"Page 3. {text}"])
def test_held_out_text_that_is_the_training_text_is_refused(change):
    texts = [" ".join(f"w{i}x{j}" for j in range(40)) for i in range(60)]
    ask = Data(min_document_chars=0)
    with pytest.raises(UserError, match=r"left to train on|is in the training part too"):
        split_documents([Group(texts)], ask, [Group([change(text) for text in texts])])
    made = split_documents([Group(texts)], ask, [Group(texts[:20])])
    assert made.overlap["left_out_of_training"] == 20
    assert made.overlap["share_of_13_word_runs"] == 0
    assert not {b[0] for b in made.parts["train"] + made.parts["calibration"]} & set(texts[:20])


@pytest.mark.parametrize("texts", [[], ["only one"], ["same"] * 50, ["a", "b"]])
def test_too_few_documents(texts):
    with pytest.raises(UserError, match="document"):
        split_documents([Group(texts)], Data())


@given(st.lists(st.text(min_size=1, max_size=50), max_size=40), st.integers(0, 200))
def test_joining_keeps_all_text_in_order(texts, size):
    blocks = blocks_of(texts, size)
    assert [text for block in blocks for text in block] == texts
    assert all(sum(len(text) + 1 for text in block) >= size for block in blocks[:-1])


def test_docstrings_are_found_in_the_order_of_a_walk_over_everything():
    source = (
        "'m'\nclass A:\n  'a'\n  def f(self):\n    'f'\n    def g(): 'g'\n"
        "if x:\n  def h(): 'h'\nelif y:\n  class B: 'b'\nelse:\n  async def i(): 'i'\n"
        "try:\n  def j(): 'j'\nexcept E:\n  def k(): 'k'\nelse:\n  def n(): 'n'\nfinally:\n  def l(): 'l'\n"
        "match z:\n  case 1:\n    def o(): 'o'\n  case _:\n    def p(): 'p'\n"
        "with q:\n  for r in s:\n    def t(): 't'\n  else:\n    class C: 'c'\n"
        "try:\n  pass\nexcept* E:\n  class D: 'd'\nwhile u:\n  def v(a=lambda: 0): 'v'\n"
    )
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for text in (source, Path(argparse.__file__).read_text(), Path(typing.__file__).read_text()):
        tree = ast.parse(text)
        assert list(_documented(tree)) == [node for node in ast.walk(tree) if isinstance(node, kinds)]


def test_python_docs_are_english_deduplicated_and_stable():
    first = python_docs()
    assert first == python_docs()
    size = sum(len(t.encode()) for t in first)
    assert 1_000_000 < size < 5_000_000
    paragraphs = [" ".join(p.split()) for t in first for p in t.split("\n\n") if len(p) > 200]
    assert len(paragraphs) == len(set(paragraphs))
    assert any("list comprehension" in t.lower() for t in first)


def test_prepared_parts_come_from_the_store_until_the_file_changes(tmp_path):
    path, store = tmp_path / "d.txt", Store(tmp_path / "store")
    path.write_text("\n\n".join(documents()))
    ask = Data(source=str(path), min_document_chars=500)
    first, again = prepare_data(ask, store=store), prepare_data(ask, store=store)
    assert (first.reused, again.reused) == (False, True)
    assert len(read_part(first.directory, "train")) == first.result.parts["train"].documents
    path.write_text("\n\n".join(documents(210)))
    assert prepare_data(ask, store=store).reused is False


def test_tinystories_tail_is_after_the_teachers_training_lines(test_data):
    path = test_data / "text_lm" / "tinystories" / "tinystories_lowercase_4MB.txt"
    lines = [line for line in path.read_text().split("\n") if line.strip()]
    seen = set(lines[: int(0.95 * len(lines))])
    groups = read_source(str(path), Data()).groups
    assert [group.running for group in groups] == [True]
    made = split_documents(groups, Data(source=str(path), split="tail"))
    held = [line for block in made.parts["held_out"] for line in block]
    assert len(held) > 1000
    assert sum(line in seen for line in held) / len(held) < 0.02  # only lines that stand twice in the file itself
    assert min(sum(map(len, block)) for block in made.parts["held_out"]) >= 1000


def test_hash_split_keeps_neighbouring_lines_together():
    """A held-out line between two training lines would be half known."""
    lines = [f"line {i} " + "word " * 10 for i in range(600)]
    ask = Data(source="lines.txt", min_document_chars=500, eval_share=0.2)
    made = split_documents([Group(lines, running=True)], ask)
    for blocks in made.parts.values():
        for block in blocks:
            first = lines.index(block[0])
            assert block == lines[first : first + len(block)]
            assert len(block) >= 5
    rows = split_documents([Group(lines)], ask)
    assert all(len(block) == 1 for blocks in rows.parts.values() for block in blocks)


def test_the_same_text_elsewhere_is_named_by_where_it_lies_now(tmp_path):
    store = Store(tmp_path / "store")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("\n\n".join(documents()))
    first = prepare_data(Data(source=str(tmp_path / "a.txt")), store=store)
    second = prepare_data(Data(source=str(tmp_path / "b.txt")), store=store)
    assert second.reused
    assert first.result.source.endswith("a.txt")
    assert second.result.source.endswith("b.txt")
