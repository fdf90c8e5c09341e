"""Data by the real command line: what people have is read, said and listed, or refused with a remedy, on every path."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from pathlib import Path

import pytest
from attack.command_server import Ended, Server
from command import tiny_text
from tiny_models import tiny_checkpoint

from edgedistill.data.report import MAX_FILES_LISTED

PLAN = ["plan", "-t", "phone"]
TEXTS = [f"Story {i}. {'red blue cat ' * (i % 5)}ran." for i in range(60)]


def rows(texts: list[str], **more: object) -> str:
    return "\n".join(json.dumps({"text": text, **more}) for text in texts)


def table(texts: list[str]) -> str:
    made = io.StringIO(newline="")
    csv.writer(made).writerows([["text"], *([text] for text in texts)])
    return made.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """One file of rows."""
    made = tmp_path / "texts"
    made.mkdir()
    (made / "t.jsonl").write_text(rows(TEXTS))
    return made


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@pytest.fixture
def run(server, tmp_path):
    """A command in the folder above the data."""

    def command(*words: str) -> Ended:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("EDGEDISTILL", "PYTHON"))}
        given = {**kept, "HF_HUB_OFFLINE": "1", "EDGEDISTILL_STORE": str(tmp_path / "store")}
        return server(list(words), tmp_path, given, wall_s=120)

    return command


def test_files_as_people_have_them_are_read_whole(run, tmp_path):
    """Words that pandas takes for nothing, numbers that no JSON has, a column that changes its type, compression,
    separators beyond ASCII, names that a pattern would read otherwise."""
    missing = ["None", "null", "NA", "N/A", "nan", "NULL", "n/a", "NaN"]
    late = rows(TEXTS, meta=None) + "\n" + rows(["last"], meta={"a": 1})
    cases = {
        "words.csv": (table(TEXTS + missing).encode(), 68, []),
        "score.jsonl": (rows(TEXTS, score=float("nan")).encode(), 60, []),
        "late.jsonl": (late.encode(), 61, []),
        "t.txt.gz": (gzip.compress("\n\n".join(TEXTS).encode()), 60, []),
        "t.jsonl.gz": (gzip.compress(rows(TEXTS).encode()), 60, []),
        "marks.txt": ("\n§§\n".join(TEXTS).encode(), 60, ["--document-separator", "\\n\\xa7§\\n"]),
        "t[1]*.jsonl": (rows(TEXTS).encode(), 60, []),
        "glob [v1]*/t.jsonl": (rows(TEXTS).encode(), 60, []),
        "p\u00e4th \u2603 {a,b}.ndjson": (rows(TEXTS).encode(), 60, []),
    }
    (tmp_path / "t1.jsonl").write_text(rows(["another file"] * 3))
    for name, (content, documents, words) in cases.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        done = run(*PLAN, "--data", name, *words, "--json")
        assert done.code == 0, (name, done.err)
        [read] = json.loads(done.out)["data"]
        assert (read["rows"], read["documents"], read["file_count"]) == (documents, documents, 1), name


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("latin.csv", "text\nglück\n".encode("latin-1"), "iconv -f WINDOWS-1252 -t UTF-8 latin.csv > utf8-latin.csv"),
        ("commas.jsonl", b'{"text": "a"},\n', "ends with a comma"),
        ("half.jsonl", b'{"text": "a \\ud83d"}\n', "half of a character"),
        ("chat.jsonl", b'{"messages": [{"role": "user", "content": "hi"}]}\n', "conversations are not read"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_what_to_do(run, tmp_path, name, content, remedy):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.jsonl").write_text(rows(TEXTS))
    for words in (["--data", name], ["--data", "good.jsonl", "--eval-data", name]):
        done = run(*PLAN, *words)
        assert done.code == 2 and name in done.err and remedy in done.err, done.err


def test_every_path_of_data_reads_alike(run, tmp_path, folder):
    """A recipe's field, --calibration and verify's --data: the same words and the same refusal."""
    tiny_checkpoint(tmp_path / "model", hidden=64)
    (folder / "t.jsonl").write_text(rows(tiny_text(40).split("\n\n")))
    (folder / "more.xml").write_text("<a/>")
    (tmp_path / "bad.csv").write_bytes("text\nglücklich\n".encode("latin-1"))
    (tmp_path / "r.yaml").write_text("name: mine\ndata: {source: bad.csv}\n")
    export = ["export", "--student", "model", "--format", "gguf", "--quantization", "F16", "--out", "art"]
    done = run(*export, "--calibration", "texts")
    assert done.code == 0, done.err
    verified = run("verify", "art", "--student", "model", "--data", "texts", "--min-retention", "0")
    assert verified.code in (0, 3), verified.err
    for ended in (done, verified):
        assert "data: texts: 1 file, 40 rows, 40 documents" in ended.err
        assert "left out: 1 of a kind that is not read (.xml): more.xml" in ended.err
    export[-1] = "art2"
    for words in (
        [*export, "--calibration", "bad.csv"],
        ["verify", "art", "--student", "model", "--data", "bad.csv"],
        ["plan", "r.yaml", "-t", "phone"],
        ["teacher", "cache", "--data", "bad.csv"],
    ):
        refused = run(*words)
        assert refused.code == 2 and "bad.csv, line 2 is not UTF-8" in refused.err and "iconv" in refused.err, words


def test_plan_lists_what_is_read_and_what_is_not(run, folder):
    (folder / "b.csv").write_text('text\none\n""\none\n')
    (folder / "a.jpg").write_bytes(b"no text")
    (folder / ".git").mkdir()
    (folder / "held.out").mkdir()
    (folder.parent / "held.tsv").write_text("text\nonly\nhere\n")
    words = [*PLAN, "--data", "texts", "--eval-data", "held.tsv"]
    done = run(*words)
    assert done.code == 0, done.err
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    for said in (
        "texts 2 files 63 62 1 with a blank text",
        "texts/b.csv csv 3 2 1 with a blank text",
        "texts/t.jsonl jsonl 60 60",
        "held.tsv tsv 2 2",
        "texts: 1 of the documents are repeated word for word",
        "texts: left out: 1 hidden: .git",
        "texts: left out: 1 of a kind that is not read (.jpg): a.jpg",
    ):
        assert any(said in line for line in lines), (said, done.out)
    data = json.loads(run(*words, "--json").out)["data"]
    assert [(each["source"], each["rows"], each["documents"]) for each in data] == [
        ("texts", 63, 62),
        ("held.tsv", 2, 2),
    ]
    assert data[0]["left_out"][0] == {"why": "hidden", "count": 1, "paths": [".git"]}


def test_many_files_are_not_all_printed(run, tmp_path):
    (tmp_path / "many").mkdir()
    for i in range(MAX_FILES_LISTED + 7):
        (tmp_path / "many" / f"{i:03}.txt").write_text(f"text {i}")
    done = run(*PLAN, "--data", "many")
    assert done.code == 0 and "and 7 more files" in done.out and "026.txt" not in done.out
    assert len(json.loads(run(*PLAN, "--data", "many", "--json").out)["data"][0]["files"]) == MAX_FILES_LISTED + 7


def test_a_build_says_what_it_read(run, folder):
    """Before anything is trained: this one is refused there."""
    (folder / "more.jsonl.bz2").write_bytes(b"no text")
    (folder / "t.jsonl").write_text(rows(TEXTS[:2]))
    for quiet in ([], ["-q"]):
        done = run("build", "-t", "phone", "--data", "texts", *quiet)
        assert done.code == 2 and "3 are needed" in done.err
        assert "left out: 1 of a kind that is not read (.bz2): more.jsonl.bz2" in done.err
        assert ("texts: 1 file, 2 rows, 2 documents" in done.err) == (not quiet)
