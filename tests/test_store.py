"""The store: whole or absent, one builder at a time, nothing stale."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from edgedistill.cli.store_commands import store_adopt, store_list, store_prune, store_verify
from edgedistill.errors import UserError
from edgedistill.records.base import Record
from edgedistill.store import RACY_NS, Store, Work, key_of, own_sha256, versions


class Number(Record):
    value: int


def builder(value: int = 1, calls: list[int] | None = None):
    def build(work: Work) -> Number:
        if calls is not None:
            calls.append(value)
        (work.out / "folder").mkdir()
        (work.out / "folder" / "data.bin").write_bytes(bytes(range(256)) * 10)
        return Number(value=value)

    return build


def test_a_second_run_reuses_and_other_inputs_do_not(tmp_path):
    store, calls = Store(tmp_path), []
    first = store.run("stage", {"a": 1}, builder(1, calls), Number)
    again = store.run("stage", {"a": 1}, builder(1, calls), Number)
    other = store.run("stage", {"a": 2}, builder(2, calls), Number)
    assert (first.reused, again.reused, other.reused) == (False, True, False)
    assert calls == [1, 2]
    assert again.directory == first.directory != other.directory
    assert store_verify(store) == []


def test_key_depends_on_every_input_and_not_on_their_order():
    assert key_of("s", {"a": 1, "b": [1, 2]}) == key_of("s", {"b": [1, 2], "a": 1})
    assert len({key_of("s", {"a": 1}), key_of("t", {"a": 1}), key_of("s", {"a": 2}), key_of("s", {"a": "1"})}) == 4


def test_a_failed_build_leaves_its_state_and_no_record(tmp_path):
    store = Store(tmp_path)

    def failing(work: Work) -> Number:
        (work.state / "checkpoint").write_text("42")
        (work.out / "half").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.run("stage", {}, failing, Number)
    assert store.find("stage", {}, Number) is None

    def resuming(work: Work) -> Number:
        assert not list(work.out.iterdir())
        return Number(value=int((work.state / "checkpoint").read_text()))

    assert store.run("stage", {}, resuming, Number).result.value == 42
    assert [row["state"] for row in store_list(store)] == ["finished"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "record"])
def test_a_damaged_record_is_built_again(tmp_path, damage):
    store = Store(tmp_path)
    made = store.run("stage", {}, builder(), Number)
    file = made.directory / "folder" / "data.bin"
    if damage == "truncate":
        file.write_bytes(b"x")
    elif damage == "remove":
        file.unlink()
    else:
        (made.directory / "record.json").write_text("{")
    assert store_verify(store)
    assert store.find("stage", {}, Number) is None
    assert store.run("stage", {}, builder(), Number).reused is False
    assert store_verify(store) == []


def test_verify_finds_one_changed_byte(tmp_path):
    store = Store(tmp_path)
    file = store.run("stage", {}, builder(), Number).directory / "folder" / "data.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    assert [p for p in store_verify(store) if "content changed" in p]


def rewrite(record: Path, change) -> None:
    tree = json.loads(record.read_text())
    change(tree)
    record.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree["result"].update(value=0.99),
        lambda tree: tree["inputs"].update(a=2),
        lambda tree: tree["files"].clear(),
        lambda tree: tree["files"][0].update(sha256="0" * 64),
        lambda tree: tree.update(written_unix_s=0),
        lambda tree: tree.update(key="0" * 32),
        lambda tree: tree.pop("sha256"),
        lambda tree: tree.update(schema="edgedistill.record/1"),
        # all of it made consistent with itself, but of other inputs than its folder says
        lambda tree: (tree["inputs"].update(a=2), tree.update(sha256=own_sha256(tree))),
    ],
)
def test_an_edited_record_is_not_believed(tmp_path, change):
    store, said = Store(tmp_path), []
    made = store.run("stage", {"a": 1}, builder(7), Number)
    rewrite(made.directory / "record.json", change)
    assert len(store_verify(store)) == 1 and str(made.directory) in store_verify(store)[0]
    assert [(row["state"], row["what"]) for row in store_list(store)] == [("damaged", "")]
    assert store.find("stage", {"a": 1}, Number) is None
    again = store.run("stage", {"a": 1}, builder(7), Number, said.append)
    assert (again.reused, again.result.value) == (False, 7)
    assert len(said) == 1 and "made again" in said[0] and "record.json" in said[0]
    assert store_verify(store) == []


def overwrite(path: Path, at: int, data: bytes) -> None:
    """In place, with size, inode and mtime as they were."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_ino, after.st_mtime_ns) == (before.st_size, before.st_ino, before.st_mtime_ns)


def test_a_file_changed_in_place_is_seen(tmp_path):
    store, said = Store(tmp_path), []
    made = store.run("stage", {}, builder(), Number)
    overwrite(made.directory / "folder" / "data.bin", 100, b"\0\0")
    assert store.find("stage", {}, Number) is None
    assert store.run("stage", {}, builder(), Number, said.append).reused is False
    assert "data.bin: content changed" in said[0]
    source = tmp_path / "weights"
    source.write_bytes(b"a" * 5000)
    time.sleep(2 * RACY_NS / 1e9)
    before = store.hash_file(source)
    overwrite(source, 4000, b"b")
    assert store.hash_file(source) != before


def test_a_file_too_large_to_hash_each_time(tmp_path, monkeypatch):
    """Its stamp tells of a write; blocks drawn anew each time of what no stamp tells of."""
    monkeypatch.setattr("edgedistill.store.FULL_HASH_BYTES", 1000)
    monkeypatch.setattr("edgedistill.store.BLOCKED_ABOVE_BYTES", 2000)
    monkeypatch.setattr("edgedistill.store.BLOCK_BYTES", 64)
    store = Store(tmp_path)
    made = store.run("stage", {}, builder(), Number)
    file = made.directory / "folder" / "data.bin"
    record = json.loads((made.directory / "record.json").read_text())
    assert len(record["blocks"]["folder/data.bin"]) == 40
    assert store.find("stage", {}, Number) is not None
    overwrite(file, 100, b"\0\0")
    assert store.find("stage", {}, Number) is None  # by its stamp
    note = next((tmp_path / "hashes").iterdir())
    # bits that rot move no stamp: as if it had been remembered so
    status = file.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    digest = record["files"][0]["sha256"]
    note.write_text(json.dumps({"path": str(file), "stamp": stamp, "sha256": digest}))
    found = [store.find("stage", {}, Number) for _ in range(60)]
    assert None in found  # 16 of 40 blocks each time: missed in 60 with a chance of 5e-14
    assert any("content changed" in line for line in store_verify(store))


def test_verify_names_what_does_not_belong(tmp_path):
    store = Store(tmp_path)
    made = store.run("stage", {}, builder(), Number)
    (made.directory / "folder" / "extra.bin").write_bytes(b"x")
    assert [line for line in store_verify(store) if "extra.bin: not part of the record" in line]


def test_pruning_all_empties_the_store(tmp_path):
    store = Store(tmp_path)
    store.run("stage", {}, builder(), Number)
    key = "0" * 32
    for name in (
        f"downloads/{key[:24]}/x", f"logs/student-{key}/events", f"probes/{key[:16]}-{key[:16]}.json",
        f"hashes/{key}.json", f"reports/{key}/retention.json",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("x")
    store_prune(store, everything=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_prune_removes_nothing_of_the_users_own(tmp_path):
    """A folder that was there before, named as the store by mistake; and what a link in the store leads to."""
    root, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    names = ("records/jazz/album/song", "work/thesis/text", "reports/annual.pdf", "logs/web.log", "downloads/image.iso")
    own = [root / name for name in names] + [elsewhere / ("0" * 32) / "photo", elsewhere / "stage" / ("1" * 32) / "x"]
    for path in own:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    (root / "records" / "linked").symlink_to(elsewhere)
    made = Store(root).run("stage", {}, builder(), Number)
    (root / "records" / "stage" / ("2" * 32)).symlink_to(elsewhere / ("0" * 32))
    assert store_prune(Store(root)) == []
    assert store_prune(Store(root), everything=True) == [str(made.directory)]
    assert [path.read_text() for path in own] == ["mine"] * len(own)
    assert store_list(Store(root)) == []
    (root / "records").rename(tmp_path / "moved")
    (root / "records").symlink_to(tmp_path / "moved")
    assert store_prune(Store(root), everything=True) == []


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from edgedistill.store import Store
from edgedistill.records.base import Record
class Number(Record):
    value: int
def build(work):
    print("building", flush=True)
    log = Path({log!r})
    with log.open("a") as file: file.write("start\\n")
    time.sleep({seconds})
    (work.out / "data").write_bytes(b"x" * 1000)
    with log.open("a") as file: file.write("end\\n")
    return Number(value=1)
print(Store(Path({store!r})).run("stage", {{}}, build, Number, print).reused, flush=True)
"""


def script(tmp_path: Path, repository: Path, seconds: float) -> list[str]:
    text = SCRIPT.format(
        root=str(repository), log=str(tmp_path / "log"), store=str(tmp_path / "store"), seconds=seconds
    )
    return [sys.executable, "-c", textwrap.dedent(text)]


def test_two_processes_build_once(tmp_path, repository):
    command = script(tmp_path, repository, 1.0)
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [process.communicate()[0].split()[-1] for process in processes]
    assert sorted(answers) == ["False", "True", "True"]
    assert (tmp_path / "log").read_text().split() == ["start", "end"]


def test_a_killed_builder_frees_its_lock(tmp_path, repository):
    process = subprocess.Popen(script(tmp_path, repository, 60), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "building"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = subprocess.run(script(tmp_path, repository, 0), capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


def test_hashes_are_remembered_until_the_file_changes(tmp_path):
    store, file = Store(tmp_path / "store"), tmp_path / "weights"
    file.write_bytes(b"a" * 5000)
    store.hash_file(file)
    assert not (tmp_path / "store" / "hashes").exists()  # written just now: the next write may have the same stamp
    time.sleep(2 * RACY_NS / 1e9)
    first = store.hash_file(file)
    cache = next((tmp_path / "store" / "hashes").iterdir())
    kept = json.loads(cache.read_text())
    cache.write_text(json.dumps({**kept, "sha256": "remembered"}))
    assert store.hash_file(file) == "remembered"
    file.write_bytes(b"b" * 5000)
    os.utime(file, ns=(1, 1))
    assert store.hash_file(file) not in (first, "remembered")


def test_prune_leaves_what_is_being_built(tmp_path):
    store = Store(tmp_path)
    store.run("old", {}, builder(), Number)
    busy = store.run("busy", {}, builder(), Number)
    with store.lock(f"busy-{busy.key}"):
        removed = store_prune(Store(tmp_path), everything=True)
    assert len(removed) == 1
    assert store.find("busy", {}, Number) is not None
    assert store_prune(store, stage="nothing") == []


def test_a_store_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        Store(tmp_path / "file" / "store").run("s", {}, builder(), Number)


class Weights(Record):
    value: int
    adopted: bool = False


def test_adopting_keeps_a_student_across_an_upgrade(tmp_path):
    store = Store(tmp_path)
    old = {"seed": 1, "versions": {"numpy": "0.0.1", "nothing-like-it": "1"}}

    def build(work: Work) -> Weights:
        (work.out / "model").write_bytes(b"weights")
        return Weights(value=7)

    made = store.run("student", old, build, Weights)
    new = {**old, "versions": versions("numpy", "nothing-like-it")}
    assert store.find("student", new, Weights) is None
    assert [row["from"] for row in store_adopt(store)] == [made.key]
    kept = store.find("student", new, Weights)
    assert kept is not None
    assert kept.result == Weights(value=7, adopted=True)
    assert (kept.directory / "model").read_bytes() == b"weights"
    assert store_adopt(store) == []
    assert store_verify(store) == []


def test_a_damaged_student_is_not_adopted(tmp_path):
    store = Store(tmp_path)
    made = store.run("student", {"versions": {"numpy": "0.0.1"}}, builder(), Number)
    (made.directory / "folder" / "data.bin").write_bytes(b"x")
    assert store_adopt(store) == []


def test_a_bare_prune_removes_only_what_is_damaged(tmp_path):
    store = Store(tmp_path)
    good = store.run("good", {}, builder(), Number)
    bad = store.run("bad", {}, builder(), Number)
    worse = store.run("worse", {}, builder(), Number)
    (bad.directory / "record.json").write_text("{")
    data = bytearray((worse.directory / "folder" / "data.bin").read_bytes())
    data[5] ^= 1
    (worse.directory / "folder" / "data.bin").write_bytes(data)
    assert sorted(store_prune(store)) == sorted([str(bad.directory), str(worse.directory)])
    assert good.directory.is_dir()
    assert store_verify(store) == []
    with pytest.raises(UserError):
        store_prune(store, everything=True, stage="good")
