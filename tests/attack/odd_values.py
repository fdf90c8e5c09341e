"""Values, texts and files that no program should be given, and what a mutation makes of a good one."""

from __future__ import annotations

import copy
import gzip
import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 2**31, 2**31 - 1, 2**53, 2**63, 2**64, 10**9, 10**15, 10**40, -(10**18), 0.0, -0.5,
    1.5, 1e-300, 1e300, 5e-324, "", " ", "x", "1", "-1", "true", "null", "../..", "/dev/zero", "a\0b", "\u202e", "é",
    "x" * 10_000, [], [1], ["x"], [[]], [None], {}, {"a": 1}, {"x": {"y": []}}, list(range(1000)), "1:30", "yes", "\n",
    "(a+)+$", "%s%n", "${HOME}", "{0.__class__}", "gguf:Q4_0", "onnx:INT4", "bf16", "fp32", "auto", "silu", "gelu",
]  # fmt: skip
# Text that is a value in JSON or YAML, but never a sound one.
RAW = [
    "1" * 5000, "1e999", "-1e999", "NaN", "Infinity", "[" * 100_000, '{"a":' * 50_000, '"' + "x" * 100_000, "0x" + "f" * 3000,
    '"\\ud800"', '"\\x"', "1:30", "010", ".inf", ".nan", "*a", "&a 1", "!!python/object:os.system x", "[1, 2", "{a: b: c}",
    "2024-13-45", "\t", "%", "@", "`", "'", '"', "? a", "- a\n- b", "<<: *x", "a: 1\na: 2", "\ufeff1", "\x1b[2J", "\x00",
]  # fmt: skip
PATHS = [
    "", " ", "/", "/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", "/proc/nowhere/x", "/proc/1/root/x", "/sys/x/y",
    "x" * 300, "y/" * 3000, "z" * 5000, "~nobody-at-all/x", "here.txt/child", ".", "..", "loop", "fifo", "dangling", "-",
    "a\nb", "\x1b[31mred", "😀", "naïve", "\udcff\udcfe", "socket", "folder", "http://127.0.0.1:1/x.jsonl",
    "s3://bucket/x.jsonl", "ftp://x/y.csv", "foo://bar.csv", "file:///dev/zero", "http://[", "org/model", "org/../model",
    "a/b/c", "../" * 200 + "x", "here.txt", "\u202etxt.exe", "%00", "$(reboot)", "CON", "x" * 254 + ".yaml", "fifo.yaml",
    "folder.yaml", "dangling.yaml", "zero.yaml", "loop.yaml", "fifo.jsonl", "zero.jsonl", "loop.txt", "folder.jsonl",
]  # fmt: skip


def lay_paths(folder: Path) -> None:
    """What some of PATHS name."""
    (folder / "here.txt").write_text("a line of text\n" * 50)
    for name in ("folder", "folder.yaml", "folder.jsonl"):
        (folder / name).mkdir()
    for name in ("fifo", "fifo.yaml", "fifo.jsonl"):
        os.mkfifo(folder / name)
    for name in ("loop", "loop.yaml", "loop.txt"):
        (folder / name).symlink_to(name)
    for name in ("dangling", "dangling.yaml"):
        (folder / name).symlink_to("nothing-there")
    for name in ("zero.yaml", "zero.jsonl"):
        (folder / name).symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(folder)  # a socket's path has at most 107 characters
        try:
            bound.bind("socket")
        finally:
            os.chdir(here)


def replace_kind(path: Path, kind: str) -> None:
    """Put something else in a file's place: a FIFO, a folder, a device, a link to nothing, a link to itself, nothing."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "null":
        path.symlink_to("/dev/null")
    elif kind == "dangling":
        path.symlink_to("nothing-there")
    elif kind == "loop":
        path.symlink_to(path.name)


KINDS = ["fifo", "folder", "device", "null", "dangling", "loop", "gone"]
BYTES: dict[str, Callable[[random.Random], bytes]] = {
    "empty": lambda rng: b"",
    "blank": lambda rng: b" \n\n \n",
    "noise": lambda rng: rng.randbytes(3000),
    "zeros": lambda rng: bytes(1 << 20),
    "utf16": lambda rng: ("text " * 500).encode("utf-16"),
    "latin1": lambda rng: ("café " * 500).encode("latin-1"),
    "surrogates": lambda rng: b"\xed\xa0\x80 text\n" * 50,
    "controls": lambda rng: b"\x1b[2J\x07 text\n" * 500,
    "deep": lambda rng: b"[" * 100_000,
    "deep closed": lambda rng: b"[" * 100_000 + b"]" * 100_000,
    "deep object": lambda rng: b'{"text":' * 100_000,
    "gzip": lambda rng: gzip.compress(bytes(1 << 24)),
    "bomb": lambda rng: gzip.compress(gzip.compress(bytes(1 << 26))),
    "digits": lambda rng: b"1" * 200_000,
    "bom": lambda rng: b"\xef\xbb\xbf{}",
    "brackets": lambda rng: b'{"text": "a"}' + b"]" * 1000,
    "lone": lambda rng: b'{"text": "\\ud800"}\n' * 10,
    "parquet": lambda rng: b"PAR1" + rng.randbytes(2000) + (500).to_bytes(4, "little") + b"PAR1",
    "parquet footer": lambda rng: b"PAR1" + (1 << 31).to_bytes(4, "little") + b"PAR1",
    "quotes": lambda rng: b'text\n"never closed\n' + b"a,b,c\n" * 100,
    "fields": lambda rng: b"text,b\n" + b"a,b,c\n" * 10,
    "one line": lambda rng: b"word " * 200_000,
    "lines": lambda rng: b"\n" * 200_000,
    "nul": lambda rng: b'{"text": "a\\u0000b"}\n' * 20,
    "rows": lambda rng: b'{"text": 1}\n{"text": null}\n[]\n',
    "twice": lambda rng: b'{"text": "a", "text": "b"}\n' * 5,
    "nan": lambda rng: b'{"text": "a", "n": NaN}\n' * 5,
}


def mutate_bytes(raw: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled or put in."""
    made = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(len(made) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(made):
            made[at] = rng.randrange(256)
        elif kind == 1:
            del made[at : at + rng.choice([1, 2, 10, 100])]
        elif kind == 2:
            made[at:at] = made[at : at + rng.choice([1, 10, 100])]
        elif kind == 3:
            made[at:at] = rng.choice(RAW)[:5000].encode("utf-8", "replace")
        else:
            made[at:at] = rng.choice(
                [b"\0", b"\xff", b"[", b"{", b'"', b"\\", b"\n", b":", b"-", b"\xed\xa0\x80", b"1e9"]
            )
    return bytes(made)


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """A copy with one to three values, chosen anywhere in it, replaced, taken out or put in."""
    made = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(made))
        if not places:
            return rng.choice(ODD)
        node, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind == 0 and isinstance(node, dict):
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(["x", "", key + "s", "é", "a.b", "\x1b", "k" * 500])] = copy.deepcopy(rng.choice(ODD))
        elif kind == 2 and isinstance(node, list):
            node.append(copy.deepcopy(rng.choice(ODD)))
        else:
            node[key] = copy.deepcopy(rng.choice(ODD))
    return made


def _places(node: Any) -> Any:
    if isinstance(node, dict):
        for key, value in node.items():
            yield node, key
            yield from _places(value)
    elif isinstance(node, list):
        for index, value in enumerate(node[:50]):
            yield node, index
            yield from _places(value)


def json_with_raw(tree: Any, rng: random.Random) -> bytes:
    """The tree as JSON, in which one value is RAW text: what json.dumps would never write."""
    made = copy.deepcopy(tree)
    places = [place for place in _places(made) if isinstance(place[0], dict)]
    if places:
        node, key = rng.choice(places)
        node[key] = "@@RAW@@"
    return json.dumps(made).replace('"@@RAW@@"', rng.choice(RAW), 1).encode("utf-8", "surrogatepass")
