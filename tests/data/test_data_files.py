"""Data files as people have them: under any name, in any of the formats, replaced at once; nothing lost in silence."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgedistill.config.recipe import Data, load_recipe
from edgedistill.data.documents import read_documents, read_source
from edgedistill.data.prepare import prepare_data, read_part
from edgedistill.errors import UserError
from edgedistill.store import Store

RNG = random.Random(0)
TEXTS = [f"Story {i}. {' '.join(RNG.choices(['red', 'blue', 'cat', 'ran', 'tree'], k=12))}." for i in range(40)]
SEPARATOR, WRITTEN_SEPARATOR = r"\n<|§ \u2028|>\n", "\n<|§ \u2028|>\n"
WHOLE = (".parquet", ".arrow")
FORMATS = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", *WHOLE)
COMPRESSED = tuple(suffix + end for suffix in FORMATS if suffix not in WHOLE for end in (".gz", ".zst"))
MISSING = ["None", "null", "NA", "nan", "N/A", "0012", "1e5", "True", "#", r"\N"]
ODD = [*MISSING, "\ufdd01\ufdd02\r2", '"', '"whole"', "a,b", "a\tb", "x\ny", "\r"]
CHARACTERS = st.characters(exclude_categories=["Cs"]) | st.sampled_from('"\n\r\t,\u2028\x85\ufdd0 ')
DOCUMENTS = st.lists(
    (st.sampled_from(ODD) | st.text(CHARACTERS, max_size=30) | st.lists(st.sampled_from(ODD)).map("".join)).filter(
        str.strip
    ),
    min_size=1,
    max_size=8,
)
NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]) | st.sampled_from("[]*?{}!#%~. -$'\"\\:"),
    max_size=12,
)


def written(texts: list[str], suffix: str) -> bytes:
    """What the usual writer of a format makes of texts."""
    import pyarrow

    if suffix.endswith(".gz"):
        return gzip.compress(written(texts, suffix.removesuffix(".gz")))
    if suffix.endswith(".zst"):
        return bytes(pyarrow.compress(written(texts, suffix.removesuffix(".zst")), codec="zstd", asbytes=True))
    if suffix == ".parquet":
        from pyarrow import parquet

        sink = io.BytesIO()
        parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), sink)
        return sink.getvalue()
    if suffix == ".arrow":
        table, sink = pyarrow.table({"id": range(len(texts)), "text": texts}), io.BytesIO()
        kind = pyarrow.ipc.new_stream if len(texts) % 2 else pyarrow.ipc.new_file
        with kind(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
        return sink.getvalue()
    if suffix in (".csv", ".tsv"):
        made = io.StringIO(newline="")
        csv.writer(made, delimiter="\t" if suffix == ".tsv" else ",").writerows([["text"], *([text] for text in texts)])
        return made.getvalue().encode()
    if suffix == ".txt":
        return WRITTEN_SEPARATOR.join(texts).encode()
    rows = [json.dumps({"text": text}, ensure_ascii=len(texts) % 2 == 0) for text in texts]
    return (f"[{', '.join(rows)}]" if suffix == ".json" else "\n".join(rows)).encode()


def read(path: Path, **asked: object) -> list[str]:
    return read_documents(str(path), Data.model_validate({"source": str(path), **asked}))


def refusal(path: Path, **asked: object) -> UserError:
    with pytest.raises(UserError) as error:
        read(path, **asked)
    assert error.value.remedy
    return error.value


@pytest.mark.parametrize("suffix", [*FORMATS, *COMPRESSED])
def test_any_texts_under_any_name_read_back_the_same(suffix):
    """In one process, and after another file takes the name within the same second."""

    @settings(max_examples=60 if suffix in FORMATS else 15, deadline=None, database=None)
    @given(st.lists(DOCUMENTS, min_size=2, max_size=2), NAMES)
    def holds(both: list[list[str]], name: str) -> None:
        if suffix.startswith(".txt"):  # what the format can say: it has no control characters and no escapes
            for texts in both:
                joined = WRITTEN_SEPARATOR.join(texts)
                assume(joined.split(WRITTEN_SEPARATOR) == texts and not joined.startswith("\ufeff"))
                assume(not any(ord(c) < 32 and c not in "\t\n\r\f" for c in joined))
                assume(joined.count("\n") > joined.count("\r\n") or "\r\n" not in joined)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name + suffix)
            for texts in both:
                path.write_bytes(written(texts, suffix))
                os.utime(path, (1_700_000_000, 1_700_000_000))
                assert read(path, document_separator=SEPARATOR) == texts

    holds()


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_replaced_file_makes_another_record(tmp_path, suffix):
    """Same name, size class and time stamp, in one process and one store: the new text is trained on."""
    path, store = tmp_path / f"data{suffix}", Store(tmp_path / "store")
    seen = []
    for word in ("FIRST", "OTHER"):
        path.write_bytes(written([f"{word} {text}" for text in TEXTS], suffix))
        os.utime(path, (1_700_000_000, 1_700_000_000))
        made = prepare_data(Data(source=str(path), eval_share=0.2), store=store)
        assert not made.reused
        seen += [text for part in made.result.parts for block in read_part(made.directory, part) for text in block]
    assert sorted(text.split()[0] for text in seen) == ["FIRST"] * 40 + ["OTHER"] * 40


@pytest.mark.parametrize("name", ["data[1].jsonl", "data*.jsonl", "dat?1.jsonl", "{data1,x}.jsonl", "**.jsonl"])
def test_no_character_of_a_name_is_a_pattern(tmp_path, name):
    for place in (tmp_path, tmp_path / "folder [old]*"):
        place.mkdir(exist_ok=True)
        (place / "data1.jsonl").write_bytes(written(["another file"], ".jsonl"))
        (place / name).write_bytes(written(TEXTS, ".jsonl"))
        assert read(place / name) == TEXTS


def test_a_name_that_begins_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("~data.csv").write_bytes(written(TEXTS, ".csv"))
    assert read(Path("~data.csv")) == TEXTS


@pytest.mark.parametrize("columns", [("text",), ("id", "text"), ("text", "id")])
def test_marks_in_a_tsv_that_nobody_quoted(tmp_path, columns):
    """Two marks, at a text's start and hundreds of lines below at a text's end, swallowed all between them."""
    texts = [f"{i} {text}" for i, text in enumerate(TEXTS * 10)]
    texts[7], texts[300] = f'"{texts[7]}', f'{texts[300]}"'
    lines = ["\t".join(f"i{i}" if column == "id" else text for column in columns) for i, text in enumerate(texts)]
    path = tmp_path / "marks.tsv"
    path.write_text("\n".join(["\t".join(columns), *lines]))
    if len(columns) == 2:
        assert read(path) == texts
    else:  # what one column means cannot be told: it is read as quoted, and that is said
        found = read_source(str(path), Data())
        assert found.read is not None and "goes from line 9 to 302" in found.read.files[0].notes[0]
    texts[20] = 'He said "no".'
    texts[30] = '"Quite," she said'
    lines = ["\t".join(f"i{i}" if column == "id" else text for column in columns) for i, text in enumerate(texts)]
    path.write_text("\n".join(["\t".join(columns), *lines]))
    assert read(path) == texts


def test_quoted_tables_of_other_writers(tmp_path):
    texts = ['say "no"', "a\tb", "two\nlines", "plain", "a, b", "12"]
    for separator, suffix in ((",", ".csv"), ("\t", ".tsv")):
        for quoting in (csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC, csv.QUOTE_MINIMAL):
            for end in ("\n", "\r\n"):
                path = tmp_path / f"t{suffix}"
                with path.open("w", newline="") as file:
                    writer = csv.writer(file, delimiter=separator, quoting=quoting, lineterminator=end)
                    writer.writerows([["n", "text", "more"], *([i, text, "x"] for i, text in enumerate(texts))])
                assert read(path) == texts, (suffix, quoting, end)


def test_every_row_is_a_document_or_counted(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('id,text\n1,one\n2,\n3,"  "\n4\n\n5,None\n6,one\n,,\n7,seven,,\n')
    found = read_source(str(path), Data())
    assert found.texts == ["one", "None", "one", "seven"]
    assert found.read is not None
    assert (found.read.rows, found.read.documents, found.read.duplicates, found.read.whole) == (8, 4, 1, True)
    assert found.read.dropped == {"with a blank text": 3, "without a text": 1}
    lines = [{"text": "a"}, {"other": 1}, {"text": None}, {"text": " "}, {"text": "b", "score": float("nan")}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read_source(str(tmp_path / "t.jsonl"), Data())
    assert found.texts == ["a", "b"] and found.read is not None
    assert found.read.rows == 5 == found.read.documents + sum(found.read.dropped.values())
    first = read_source(str(tmp_path / "t.jsonl"), Data(max_documents=1)).read
    assert first is not None and (first.documents, first.whole) == (1, False)


@pytest.mark.parametrize(
    ("name", "content", "cause", "remedy"),
    [
        ("t.csv", "text\nglücklich\n".encode("latin-1"), "line 2 is not UTF-8: byte 2 is 0xfc", "Latin-1"),
        ("t.csv", "text\n“glücklich”\n".encode("cp1252"), "line 2 is not UTF-8", "iconv -f WINDOWS-1252"),
        ("t.csv", "text\na\n".encode("utf-16"), "is UTF-16", "iconv -f UTF-16 "),
        ("a b.txt", "some words\n".encode("utf-16-be") * 9, "is UTF-16BE", "a b.txt' > "),
        ("t.txt", b"some\0words" * 99, "is binary", "give text in UTF-8"),
        ("t.jsonl", b'{"text": "a"},\n{"text": "b"},\n', "line 1", "ends with a comma"),
        ("t.jsonl", b'{"text": "a \\ud83d"}\n', "half of a surrogate pair", "write \\ufffd in its place"),
        ("t.jsonl", b'{"text": "a", "text": "b"}\n', "appears twice", "give each key of a row once"),
        ("t.jsonl", b'[{"text": "a"}]', "holds a list", "is a .json file"),
        ("t.jsonl", b"{'text': 'a'}", "line 1", "json.dumps"),
        ("t.jsonl", b'{\n"text": "a"\n}', "line 1", "over several lines"),
        ("t.jsonl", b'{"text": [{"role": "user", "content": "hi"}]}', "holds list", "chat template"),
        ("t.jsonl", b'{"messages": [{"role": "user", "content": "hi"}]}', "it has messages", "chat template"),
        ("t.jsonl", b'{"Text": "a"}', "no column 'text'", "--set data.text_column=Text"),
        ("t.csv", b"id,text \n1,a\n", "no column 'text'", """--set 'data.text_column="text "'"""),
        ("t.json", b'{\n "data": [\n {"text": "a"}]}', "rows are under 'data'", "jq .data t.json"),
        ("t.json", b'{"text": {"0": "a", "1": "b"}}', "holds dict", "orient='records'"),
        ("t.jsonl", b'{"text": {"content": "a"}}', "holds dict", "fields of it ('content')"),
        ("t.jsonl", b'{"text": ["a", "b"]}', "holds list", "a row for each text"),
        ("t.csv", b"sep=;\nid;text\n1;a\n", "no column 'text'", "separated by ';'"),
        ("t.csv", b'{"text": "a"}\n', "no column 'text'", "name it .jsonl"),
        ("t.xlsx", b"PK\x03\x04more", "an Excel table", "as .csv"),
        ("t.pdf", b"%PDF-1.7\n", "is a PDF", "pdftotext"),
        ("rows.pq", b"PAR1 more", "is Parquet", "rename it to rows.pq.parquet"),
        ("t.csv", b"id;text\n1;a\n", "no column 'text'", "separated by ';'"),
        ("t.csv", b"text\ra\rb", "CR alone", "tr '\\r' '\\n' < "),
        ("t.csv", b'text\nfine\n"never closed\nmore\n', "line 3: unexpected end", "written twice"),
        ("t.csv", b"text\n", "is empty", "give a file with text"),
        ("t.txt", b"BZh91AY&SY more", "compressed (bzip2)", "bunzip2"),
        ("t.txt", gzip.compress(b"text", mtime=0), "compressed (gzip)", "rename it to t.txt.gz"),
        ("t.gz", gzip.compress(b"text", mtime=0), "compressed (gzip)", "t.txt.gz, t.jsonl.gz"),
        ("corpus", gzip.compress(b"text", mtime=0), "compressed (gzip)", "corpus.txt.gz, corpus.jsonl.gz"),
        ("t.parquet.gz", gzip.compress(b"PAR1", mtime=0), "compressed (gzip)", "gunzip"),
        ("t.parquet.gz", b"PAR1 more", "is Parquet", "rename it to t.parquet.gz.parquet"),
        ("t.tar.gz", gzip.compress(b"t", mtime=0), "compressed (gzip)", "tar -xf "),
        ("t.txt", b"\xff\xff\xff\xff more", "is an Arrow file", "rename it to t.txt.arrow"),
        ("t.arrow", b"\xff\xff\xff\xff more", "cannot be read as Arrow", "write it again"),
        ("t.txt.gz", b"plain", "cannot be read as gzip", "give it the right ending"),
        ("t.txt.zst", b"plain", "cannot be read as zstd", "give it the right ending"),
        ("t.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "cannot be read as gzip", "copy or write"),
        ("rows", b'{"text": "a"}\n{"text": "b"}\n', "does not end in .jsonl", "rename it: mv "),
        ("rows.log", b'{"text": "a"}\n{"text": "b"}\n', "does not end in .jsonl", "rows.log.jsonl"),
    ],
)  # fmt: skip
def test_the_remedy_fits_the_cause(tmp_path, name, content, cause, remedy):
    path = tmp_path / name
    path.write_bytes(content)
    found = refusal(path)
    assert cause in found.cause and name in found.cause
    assert remedy in found.remedy


def test_a_remedy_that_is_a_command_works(tmp_path):
    path = tmp_path / "it's [old].csv"
    path.write_bytes("text\nglücklich\n“so”\n".encode("cp1252"))
    command = refusal(path).remedy.partition(": ")[2]
    subprocess.run(command, shell=True, check=True)
    assert read(tmp_path / "utf8-it's [old].csv") == ["glücklich", "“so”"]
    packed = tmp_path / "t.csv.gz"
    packed.write_bytes(gzip.compress("text\nglücklich\n".encode("latin-1")))
    subprocess.run(refusal(packed).remedy.partition(": ")[2], shell=True, check=True)
    assert read(tmp_path / "utf8-t.csv.gz") == ["glücklich"]
    (tmp_path / "log.txt").write_text("\x1b[31mred\x1b[0m")
    subprocess.run(refusal(tmp_path / "log.txt").remedy.partition(": ")[2], shell=True, check=True)
    assert read(tmp_path / "clean-log.txt") == ["[31mred[0m"]
    spaced = tmp_path / "spaced.csv"
    spaced.write_text("id,text \n1,a\n")
    words = shlex.split(refusal(spaced).remedy.removeprefix("name it: "))
    assert read_documents(str(spaced), load_recipe("own", words[1:]).data) == ["a"]
    rows = tmp_path / "ro ws"
    rows.write_bytes(written(["a", "b"], ".jsonl"))
    subprocess.run(refusal(rows).remedy.partition(": ")[2], shell=True, check=True)
    assert read(tmp_path / "ro ws.jsonl") == ["a", "b"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "cp1252"])
@pytest.mark.parametrize("suffix", [s for s in (*FORMATS, *COMPRESSED) if s not in WHOLE])
def test_what_converts_another_encoding_gives_its_texts(tmp_path, encoding, suffix):
    """Bytes of the wide ones are UTF-8 too, letter by letter, so that a reader gets far with them."""
    texts = ["“glücklich”, they said.", "Once upon a time there was a café."]
    plain = suffix.removesuffix(".gz").removesuffix(".zst")
    raw = written(texts, plain).decode()
    if plain.startswith((".json", ".ndjson")):
        raw = json.dumps([{"text": t} for t in texts], ensure_ascii=False)
        raw = raw if plain == ".json" else "\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts)
    if plain == ".txt":
        raw = "\n".join(texts)
    path = tmp_path / f"t{suffix}"
    packed = raw.encode(encoding)
    path.write_bytes(gzip.compress(packed) if suffix.endswith(".gz") else packed)
    if suffix.endswith(".zst"):
        import pyarrow

        path.write_bytes(pyarrow.compress(packed, codec="zstd", asbytes=True))
    command = refusal(path).remedy.partition(": ")[2]
    if suffix.endswith(".zst") and shutil.which("zstd") is None:
        assert command.startswith("zstd -dc ") and "| iconv -f " in command
        return
    subprocess.run(command, shell=True, check=True)
    assert read(tmp_path / f"utf8-t{suffix}") == texts


def test_an_archive_is_unpacked_by_its_remedy(tmp_path):
    (tmp_path / "one.txt").write_text("one\n\ntwo\n")
    for name, mode in (("t.tar", "w"), ("t.tar.gz", "w:gz"), ("t.tgz", "w:gz"), ("t.txt", "w"), ("t.txt.gz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as archive:
            archive.add(tmp_path / "one.txt", "one.txt")
        subprocess.run(refusal(tmp_path / name).remedy.partition(": ")[2], shell=True, check=True)
        assert read(tmp_path / "t") == ["one", "two"]
        shutil.rmtree(tmp_path / "t")


def test_what_datasets_saved_is_read(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    texts = [f"Text {index}." for index in range(40)]
    rows = datasets.Dataset.from_dict({"text": texts, "id": list(range(40))})
    rows.save_to_disk(tmp_path / "saved", num_shards=3)
    (tmp_path / "saved" / "cache-0123456789abcdef.arrow").write_bytes(b"a cache that map left")
    found = read_source(str(tmp_path / "saved"), Data())
    assert found.texts == texts and found.read is not None
    left_out = {entry.why: entry.count for entry in found.read.left_out}
    assert left_out == {"a cache of what was made of the rows": 1, "describes a data set": 2}
    rows.select(range(10, 20)).save_to_disk(tmp_path / "selected")  # of a part, it saves the part
    assert read(tmp_path / "selected") == texts[10:20]


def test_bytes_of_a_parquet_column_are_its_text_in_utf_8(tmp_path):
    """Spark and Impala write text without saying that it is."""
    import pyarrow
    from pyarrow import parquet

    texts = ["one", None, "größer"]
    made = [None if text is None else text.encode() for text in texts]
    for kind in (pyarrow.binary(), pyarrow.large_binary(), pyarrow.dictionary(pyarrow.int32(), pyarrow.binary())):
        parquet.write_table(pyarrow.table({"text": pyarrow.array(made).cast(kind)}), tmp_path / "t.parquet")
        assert read(tmp_path / "t.parquet") == ["one", "größer"]
    parquet.write_table(pyarrow.table({"text": [b"one", b"\xff\xd8"]}), tmp_path / "t.parquet")
    assert "row 2" in refusal(tmp_path / "t.parquet").cause


def test_a_damaged_arrow_file_is_refused_and_kills_nothing(tmp_path):
    """Offsets that lead out of the file's text are in reach of whoever reads them unchecked."""
    raw = written([f"text {index} größer" for index in range(9)], ".arrow")
    rng = random.Random(0)
    for _ in range(400):
        damaged = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(raw))] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        (tmp_path / "t.arrow").write_bytes(damaged[: rng.choice((len(raw), rng.randrange(len(raw))))])
        try:
            read(tmp_path / "t.arrow")
        except UserError as error:
            assert error.remedy


def test_the_line_that_tells_excel_the_separator_is_no_row(tmp_path):
    (tmp_path / "t.csv").write_text('sep=,\nid,text\n1,"a, b"\n2,c\n')
    assert read(tmp_path / "t.csv") == ["a, b", "c"]


def test_files_that_inflate_without_end(tmp_path, monkeypatch):
    from edgedistill.data import opened

    monkeypatch.setattr(opened, "MIN_INFLATION_BYTES", 1 << 20)
    for end in (".gz", ".zst"):
        path = tmp_path / f"bomb.jsonl{end}"
        path.write_bytes(written([str(i) + "x" * 1000 for i in range(4000)], f".jsonl{end}"))
        assert "taken for a bomb" in refusal(path).remedy


@pytest.mark.parametrize(
    ("text", "separator", "expected"),
    [
        ("one\n§§\ntwo", r"\n§§\n", ["one", "two"]),
        ("one§§two", r"\xa7\u00a7", ["one", "two"]),
        ("one\u2028two", r"\u2028", ["one", "two"]),
        ("one\n<|end|>\n\ttwo \n<|end|>\n", "<|end|>", ["one", "\ttwo "]),
        (" one\n---\n\ntwo\n---\n", r"\n---\n", [" one", "\ntwo"]),
        ("one\r\n---\r\ntwo\r\nlines\r\n", r"\n---\n", ["one", "two\nlines\n"]),
        ("one\r\n---\r\ntwo\r\n", r"\r\n---\r\n", ["one", "two\n"]),
        ("a\r\nb|c\n", "|", ["a\r\nb", "c\n"]),
    ],
)  # fmt: skip
def test_what_ends_a_document_is_as_it_is_written(tmp_path, text, separator, expected):
    (tmp_path / "t.txt").write_bytes(text.encode())
    assert read(tmp_path / "t.txt", document_separator=separator) == expected


def test_a_separator_that_is_not_there_is_said(tmp_path):
    (tmp_path / "t.txt").write_text("one\n\ntwo")
    found = read_source(str(tmp_path / "t.txt"), Data(document_separator="§")).read
    assert found is not None and "does not stand in it" in found.files[0].notes[0]


def test_a_url_is_read_as_it_is_now(monkeypatch):
    """A file system that gives no ETag: what was fetched once is not what lies there now."""
    import fsspec

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    files = fsspec.filesystem("memory")
    for word in ("FIRST", "OTHER"):
        texts = [f"{word} {text}" for text in ("None", "NA", "x")]
        for suffix in (".csv", ".jsonl", ".tsv.gz", ".parquet"):
            url = f"memory://edgedistill/t{suffix}"
            files.pipe(url, written(texts, suffix))
            assert read_documents(url, Data(source=url)) == texts
            if not suffix.endswith(".gz"):
                found = read_source(url, Data(source=url, streaming=True, max_documents=2))
                assert found.texts == texts[:2] and found.read is not None and not found.read.whole
    with pytest.raises(UserError, match=r"tsv \(gzip\), and jsonl, csv, parquet are streamed"):
        read_source(url := "memory://edgedistill/t.tsv.gz", Data(source=url, streaming=True, max_documents=2))


def test_line_ends_and_marks_of_other_systems(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfid,text\r\r\n1,one\r\r\n2,two\r\r\n")
    assert read(tmp_path / "t.csv") == ["one", "two"]
    part = b"\xef\xbb\xbf" + written(["one", "two"], ".jsonl") + b"\r\n"
    (tmp_path / "t.jsonl").write_bytes(part + part)
    assert read(tmp_path / "t.jsonl") == ["one", "two"] * 2
    (tmp_path / "t.txt").write_bytes(b"one\r\rtwo\rlines\r\rthree\rmore\r")
    assert read(tmp_path / "t.txt") == ["one", "two\nlines", "three\nmore"]


def test_two_marks_in_a_csv_are_a_warning(tmp_path):
    """By its format they quote what stands between them; that this may be a mistake is said."""
    path = tmp_path / "t.csv"
    for at, warned in ((9, True), (6, False)):
        lines = list(TEXTS)
        lines[5], lines[at] = f'"{lines[5]}', f'{lines[at]}"'
        path.write_text("\n".join(["text", *lines]))
        found = read_source(str(path), Data()).read
        assert found is not None and found.rows == 40 - (at - 5)
        assert [f"from line 7 to {at + 2}" in note for note in found.files[0].notes] == [True] * warned
    path.write_bytes(written(["two\n\nlines and more"] * 9 + TEXTS, ".csv"))
    found = read_source(str(path), Data()).read
    assert found is not None and not found.files[0].notes


def test_a_separator_does_nothing_to_rows_and_that_is_said(tmp_path):
    (tmp_path / "t.csv").write_bytes(written(TEXTS, ".csv"))
    found = read_source(str(tmp_path / "t.csv"), Data(document_separator="ran")).read
    assert found is not None and found.documents == len(TEXTS) and "changes nothing" in found.files[0].notes[0]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt.gz", "a"])
def test_what_git_left_in_a_files_place_is_no_text(tmp_path: Path, name: str) -> None:
    """Beside whole files too: it would be trained on, and what it stands for would be missing."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 4827364\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(UserError, match=r"(?s)pointer of Git LFS.*git lfs pull"):
        read_documents(str(tmp_path / name), Data())
    (tmp_path / "b.txt").write_text("one\n\ntwo\n")
    if "." in name:
        with pytest.raises(UserError, match="pointer of Git LFS"):
            read_documents(str(tmp_path), Data())
    (tmp_path / name).write_text(f"This page is about Git LFS.\n{pointer}")
    if name in ("a.txt", "a"):
        assert read_documents(str(tmp_path / name), Data())
