"""Bundles that somebody changed, seeded: bytes, files, names, sums, and whole lies with every hash made right again.

`change(bundle, seed, number)` changes a copy of a good bundle in place. What it gives says what was done, and whether
it is a claim that nothing in the bundle can contradict (HARMLESS): a bundle is not signed. All else must be refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attack.reseal import reseal

MANIFEST, SUMS = "manifest.json", "SHA256SUMS"
Random = random.Random
MARK = "attacked"


@dataclass(frozen=True)
class Changed:
    """`where`: of a claim, its place in a JSON file (`manifest.json:machine.cpu`). `remade`: card, samples and report
    were written anew to fit, as somebody with this program can."""

    what: str
    where: str = ""
    remade: bool = False


# How text is cut and normalised, for what reads it beside the artifact, which has a tokenizer of its own: nothing in a
# bundle contradicts it where card and manifest were made anew.
HARMLESS = (
    "preprocess/tokenizer.json:pre_tokenizer",
    "preprocess/tokenizer.json:normalizer",
    "preprocess/tokenizer.json:post_processor",
    "preprocess/tokenizer.json:decoder",
    "preprocess/tokenizer.json:truncation",
    "preprocess/tokenizer.json:padding",
    "preprocess/tokenizer.json:version",
    "preprocess/tokenizer.json:model.type",
    "preprocess/tokenizer.json:model.dropout",
    "preprocess/tokenizer.json:model.unk_token",
    "preprocess/tokenizer.json:model.continuing_subword_prefix",
    "preprocess/tokenizer.json:model.end_of_word_suffix",
    "preprocess/tokenizer.json:model.fuse_unk",
    "preprocess/tokenizer.json:model.byte_fallback",
    "preprocess/tokenizer.json:model.ignore_merges",
    "preprocess/tokenizer_config.json:backend",
    "preprocess/tokenizer_config.json:model_max_length",
    "preprocess/tokenizer_config.json:tokenizer_class",
)


def harmless(changed: Changed) -> bool:
    return changed.remade and any(changed.where == place or changed.where.startswith(f"{place}.") for place in HARMLESS)


def change(bundle: Path, seed: int, number: int, *, replay: bool = True) -> Changed:
    """Change the bundle. Without `replay`, nothing that only the runtime can tell."""
    rng = Random(f"{seed}:{number}")
    kinds = [(weight, kind) for weight, kind in KINDS if replay or kind not in NEEDS_REPLAY]
    while True:
        (kind,) = rng.choices([kind for _, kind in kinds], [weight for weight, _ in kinds])
        try:
            return kind(bundle, rng)
        except IndexError:
            continue  # this bundle has nothing that this kind could change: no number in the text that was drawn


def _seal(bundle: Path, rng: Random) -> bool:
    """Every hash right again; in half of the cases the documents too. Whether they were made anew."""
    return reseal(bundle, documents=rng.random() < 0.5)


def files_of(bundle: Path) -> list[str]:
    return sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())


# Bytes


def _bytes(bundle: Path, rng: Random) -> Changed:
    name = rng.choice(files_of(bundle))
    path = bundle / name
    data = bytearray(path.read_bytes())
    before = bytes(data)
    while bytes(data) == before:
        how = rng.choice(["flip", "set", "cut", "append", "zero", "empty", "insert", "swap"])
        at = rng.randrange(len(data)) if data else 0
        if how == "flip" and data:
            data[at] ^= 1 << rng.randrange(8)
        elif how == "set" and data:
            data[at] = rng.randrange(256)
        elif how == "cut":
            del data[at:]
        elif how == "append":
            data += rng.randbytes(rng.randint(1, 4000))
        elif how == "zero":
            data[at : at + 100] = bytes(len(data[at : at + 100]))
        elif how == "empty":
            data = bytearray()
        elif how == "insert":
            data[at:at] = rng.randbytes(rng.randint(1, 9))
        elif len(data) > 200:
            one, other = rng.randrange(len(data) - 50), rng.randrange(len(data) - 50)
            data[one : one + 20], data[other : other + 20] = data[other : other + 20], data[one : one + 20]
    path.write_bytes(data)
    return Changed(f"{how} byte {at} of {name}")


# Files

NAMES = (
    "extra.txt", ".hidden", "model/extra.bin", "model/Model.gguf", "golden/99.prompt.txt", "SHA256SUMS.bak", "Manifest.json",
    "model.sig", "manifest.json.asc", "NOTICE ", "notice", "LİCENSE", "cafe\u0301.txt", "a\u202etxt.exe", "x\x1b[31m", "con",
    "nul.txt", "COM1", "a.", "sitecustomize.py", "numpy.py", "edgedistill/__init__.py", "llama_cpp.py", "samples/python/run.py.orig",
    "preprocess/tokenizer.model.bak", "reports/x/retention.json", "x" * 255, "conftest.py", "é.txt", "a:b", "a\\b", "golden/\n.npy",
)  # fmt: skip


def _add(bundle: Path, rng: Random) -> Changed:
    name = rng.choice(NAMES)
    path = bundle / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"import os\nos.system('touch /tmp/attacked-ran')\n" if name.endswith(".py") else rng.randbytes(50)
    )
    if rng.random() < 0.5:
        reseal(bundle)
        return Changed(f"add {name!r} and seal")
    return Changed(f"add {name!r}")


def _remove(bundle: Path, rng: Random) -> Changed:
    name = rng.choice(files_of(bundle))
    (bundle / name).unlink()
    if name not in (MANIFEST, SUMS) and not name.startswith("model/") and rng.random() < 0.5:
        reseal(bundle)
    return Changed(f"remove {name}")


def _rename(bundle: Path, rng: Random) -> Changed:
    name = rng.choice(files_of(bundle))
    new = rng.choice([name.upper(), f"{name}.txt", name.replace("e", "é", 1), f"{name}\u200b", Path(name).name + "x"])
    if new == name:
        new = f"{name}~"
    (bundle / new).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).rename(bundle / new)
    return Changed(f"rename {name} to {new!r}")


def _replace(bundle: Path, rng: Random) -> Changed:
    """What is no plain file of its own, in place of one."""
    name = rng.choice(files_of(bundle))
    path = bundle / name
    how = rng.choice(["symlink", "outside", "hard", "fifo", "folder", "sparse", "dangling", "device"])
    aside = bundle.parent / f"{MARK}-{rng.randrange(10**9)}"
    if how in ("symlink", "outside", "hard"):
        shutil.copyfile(path, aside)
        path.unlink()
        os.link(aside, path) if how == "hard" else path.symlink_to(aside if how == "symlink" else "/etc/passwd")
    elif how == "sparse":
        with path.open("r+b") as file:
            file.truncate(30 << 30)
    else:
        path.unlink()
        if how == "fifo":
            os.mkfifo(path)
        elif how == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero" if how == "device" else "/nonexistent")
    return Changed(f"{name} as {how}")


def _beside(bundle: Path, rng: Random) -> Changed:
    """Beside the files: folders, deep ones, many, huge ones."""
    how = rng.choice(["empty", "deep", "many", "huge", "fifo", "link", "loop"])
    if how == "empty":
        (bundle / "cache").mkdir()
    elif how == "deep":
        here = os.open(bundle, os.O_RDONLY)
        for _ in range(60):
            os.mkdir("d" * 200, dir_fd=here)
            inner = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = inner
        os.close(here)
    elif how == "many":
        for number in range(3000):
            (bundle / f"golden/{number:05}.npy").touch()
    elif how == "huge":
        with (bundle / "model/more.bin").open("wb") as file:
            file.truncate(1 << 40)
    elif how == "fifo":
        os.mkfifo(bundle / "pipe")
    else:
        (bundle / "golden" / "inside").symlink_to(".." if how == "loop" else "/")
    return Changed(f"beside the files: {how}")


def _swap(bundle: Path, rng: Random) -> Changed:
    one, other = rng.sample([name for name in files_of(bundle) if name not in (MANIFEST, SUMS)], 2)
    first, second = (bundle / one).read_bytes(), (bundle / other).read_bytes()
    if first == second:
        return _bytes(bundle, rng)
    (bundle / one).write_bytes(second)
    (bundle / other).write_bytes(first)
    if "model/" not in one + other and rng.random() < 0.5:
        reseal(bundle)
    return Changed(f"swap {one} and {other}")


def _sparse_sealed(bundle: Path, rng: Random) -> Changed:
    """A hole in place of bytes, with hashes of the zeros that it reads as."""
    name = rng.choice(["NOTICE", "golden/00.prompt.txt", "MODEL_CARD.md", "model/model.gguf"])
    with (bundle / name).open("r+b") as file:
        file.truncate((bundle / name).stat().st_size + (64 << 10))
    reseal(bundle)
    return Changed(f"a hole at the end of {name}, sealed")


# Sums


def _sums(bundle: Path, rng: Random) -> Changed:
    path = bundle / SUMS
    lines = path.read_bytes().splitlines(keepends=True)
    at = rng.randrange(len(lines))
    line = lines[at]
    how = rng.choice(
        [
            "drop",
            "twice",
            "crlf",
            "upper",
            "space",
            "order",
            "hash",
            "path",
            "escape",
            "more",
            "blank",
            "long",
            "nul",
            "none",
        ]
    )
    changes: dict[str, Callable[[], list[bytes]]] = {
        "drop": lambda: [*lines[:at], *lines[at + 1 :]],
        "twice": lambda: [*lines[: at + 1], line, *lines[at + 1 :]],
        "crlf": lambda: [one.replace(b"\n", b"\r\n") for one in lines],
        "upper": lambda: [*lines[:at], line[:64].upper() + line[64:], *lines[at + 1 :]],
        "space": lambda: [*lines[:at], line.replace(b"  ", b" *"), *lines[at + 1 :]],
        "order": lambda: lines[::-1],
        "hash": lambda: [*lines[:at], rng.randbytes(32).hex().encode() + line[64:], *lines[at + 1 :]],
        "path": lambda: [*lines[:at], line[:66] + b"../" + line[66:], *lines[at + 1 :]],
        "escape": lambda: [*lines[:at], line[:66] + b"\x1b[2J" + line[66:], *lines[at + 1 :]],
        "more": lambda: [*lines, b"0" * 64 + b"  zz/more\n"],
        "blank": lambda: [*lines, b"\n"],
        "long": lambda: [*lines, b"0" * 64 + b"  " + b"z" * 5000 + b"\n"],
        "nul": lambda: [*lines[:at], line[:66] + b"\0" + line[66:], *lines[at + 1 :]],
        "none": lambda: [b"".join(lines)[:-1]],
    }
    new = b"".join(changes[how]())
    if new == b"".join(lines):
        new += b"#\n"
    path.write_bytes(new)
    return Changed(f"sums: {how} at line {at}")


# The manifest's text, sealed


def _write_manifest(bundle: Path, text: bytes) -> None:
    """A manifest of any bytes with the hash of itself, and sums that vouch for it."""
    field, zeros = b'"manifest_sha256": "', b"0" * 64
    at = text.find(field)
    if at >= 0:
        start = at + len(field)
        text = text[:start] + zeros + text[start + 64 :]
        text = text[:start] + hashlib.sha256(text).hexdigest().encode() + text[start + 64 :]
    (bundle / MANIFEST).write_bytes(text)
    hashes = {
        name: hashlib.sha256((bundle / name).read_bytes()).hexdigest() for name in files_of(bundle) if name != SUMS
    }
    (bundle / SUMS).write_text("".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)), newline="\n")


def _text(bundle: Path, rng: Random) -> Changed:
    text = (bundle / MANIFEST).read_bytes()
    tree = json.loads(text)
    artifact = json.dumps(tree["artifacts"][0], indent=1).encode()
    forms: dict[str, Callable[[], bytes]] = {
        "a key twice": lambda: text.replace(b'\n "name":', b'\n "name": "other",\n "name":', 1),
        "an escaped key twice": lambda: text.replace(b'\n "name":', b'\n "n\\u0061me": "other",\n "name":', 1),
        "NaN": lambda: text.replace(b'"bits_per_weight": ', b'"bits_per_weight": NaN, "x": ', 1),
        "Infinity": lambda: text.replace(b'"tolerance": 0.0', b'"tolerance": Infinity', 1),
        "1e999": lambda: text.replace(b'"tolerance": 0.0', b'"tolerance": 1e999', 1),
        "5,000 digits": lambda: text.replace(b'"parameters": ', b'"parameters": ' + b"9" * 5000, 1),
        "100,000 brackets": lambda: text.replace(b'"machine": {', b'"machine": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b",", 1),
        "brackets alone": lambda: b"[" * 100_000,
        "open brackets": lambda: text[:-3] + b', "x": ' + b'{"a":' * 50_000,
        "15 MB of values": lambda: text.replace(b'"machine": {', b'"machine": {"x": [' + b"[]," * 5_000_000 + b"1],", 1),
        "1.9 MB of values": lambda: text.replace(b'"machine": {', b'"machine": {"x": [' + b"{}," * 600_000 + b"1],", 1),
        "1.9 MB of wrong keys": lambda: text[:-3] + b"," + b",".join(b'"k%d":1' % n for n in range(90_000)) + b"}\n",
        "1.9 MB of wrong files": lambda: text.replace(b'"files": [', b'"files": [' + b"1," * 90_000, 1),
        "a long string": lambda: text.replace(b'"machine": {', b'"machine": {"x": "' + b"x" * 1_900_000 + b'",', 1),
        "open string": lambda: text[:-3] + b', "x": "' + b'\\"' * 900_000,
        "40 artifacts": lambda: text.replace(b'"artifacts": [', b'"artifacts": [' + b",".join([artifact] * 40) + b",", 1),
        "3 artifacts": lambda: text.replace(b'"artifacts": [', b'"artifacts": [' + b",".join([artifact] * 2) + b",", 1),
        "half a pair": lambda: text.replace(b'"machine": {', b'"machine": {"x": "\\ud800",', 1),
        "a byte order mark": lambda: b"\xef\xbb\xbf" + text,
        "UTF-16": lambda: text.decode().encode("utf-16"),
        "no UTF-8": lambda: text.replace(b'"machine": {', b'"machine": {"x": "\xff",', 1),
        "two documents": lambda: text + text,
        "nothing": lambda: b"",
        "null": lambda: b"null\n",
        "a comment": lambda: text.replace(b"{", b"{ // x\n", 1),
        "another schema": lambda: text.replace(b"edgedistill.bundle/1", b"edgedistill.bundle/2", 1),
        "a path of 5,000": lambda: text.replace(b'"model.gguf"', b'"' + b"d/" * 2500 + b'model.gguf"', 1),
        "a path out": lambda: text.replace(b'"golden/00.prompt.txt"', b'"../../../../etc/passwd"'),
        "a device's name": lambda: text.replace(b'"golden/00.prompt.txt"', b'"golden/aux.txt"'),
        "a path turned": lambda: text.replace(b'"golden/00.prompt.txt"', b'"golden/\\u202etxt.00"'),
        "an escape": lambda: text.replace(b'"name": "', b'"name": "\\u001b]0;owned\\u0007', 1),
        "a negative count": lambda: text.replace(b'"bytes": ', b'"bytes": -', 1),
        "true for a number": lambda: text.replace(b'"token_count": 1', b'"token_count": true', 1),
        "text for a number": lambda: text.replace(b'"new_tokens": 16', b'"new_tokens": "16"', 1),
        "a fraction": lambda: text.replace(b'"new_tokens": 16', b'"new_tokens": 16.5', 1),
    }  # fmt: skip
    how = rng.choice(sorted(forms))
    new = forms[how]()
    _write_manifest(bundle, new if new != text else text.replace(b'"schema"', b'"schemas"', 1))
    return Changed(f"manifest: {how}, sealed")


# Claims, sealed

WORDS = (
    "", "x", "0" * 64, "a" * 5000, "../../x", "/etc/passwd", "\x1b[31mred", "a\u202eb", "NaN", "gguf:Q8_0", "Q8_0", "F32", "onnx",
    "tokenizer.json", "measured", "proxy", "llama.cpp", "onnxruntime", "<script>alert(1)</script>", "{{ 7 * 7 }}", "cafe\u0301",
)  # fmt: skip


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        found += _leaves(one, (*path, key))
    return found


def _other(value: Any, rng: Random) -> Any:
    """Another value of the same kind, or of another kind."""
    if isinstance(value, bool):
        return rng.choice([not value, not value, None, 1, "true"])
    if isinstance(value, int):
        return rng.choice(
            [value + 1, value - 1, 0, -1, -value - 1, 2**40, 2**63, value * 2 + 1, 1.5, str(value), None, 10**30]
        )
    if isinstance(value, float):
        return rng.choice(
            [value * 1.1 + 1e-3, value * 0.9 - 1e-3, 0.0, -value - 1, 1e308, 1e-300, str(value), None, value * 1000 + 1]
        )
    if isinstance(value, str):
        return rng.choice([*WORDS, value + "x", value[:-1], value.upper(), None, 3, [value]])
    if isinstance(value, list):
        return rng.choice([[], value[::-1], value[1:], [*value, *value], None, {}, [*value, None], value * 300])
    if isinstance(value, dict):
        extra = {**value, "surprise": 1}
        fewer = dict(list(value.items())[1:])
        return rng.choice([{}, extra, fewer, None, [], "x", {**value, "\u202e": "\x1b"}])
    return rng.choice([0, "x", [], {}, 1e308])


def _mutate(tree: Any, rng: Random) -> str:
    """Change one place of a JSON tree; the place."""
    while True:
        path = rng.choice(_leaves(tree))
        holder = tree
        for key in path[:-1]:
            holder = holder[key]
        new = _other(holder[path[-1]], rng)
        if json.dumps(new) != json.dumps(holder[path[-1]]):
            holder[path[-1]] = new
            return ".".join(map(str, path))


def _manifest_claim(bundle: Path, rng: Random) -> Changed:
    tree = json.loads((bundle / MANIFEST).read_bytes())
    tree.pop("manifest_sha256")  # which sealing sets
    where = _mutate(tree, rng)
    tree = {"schema": tree.get("schema"), "manifest_sha256": "0" * 64, **tree}
    _write_manifest(bundle, (json.dumps(tree, indent=1) + "\n").encode())
    return Changed(f"manifest.json: {where}, sealed", f"{MANIFEST}:{where}")


def _record_claim(bundle: Path, rng: Random) -> Changed:
    name = rng.choice([name for name in files_of(bundle) if name.endswith(("retention.json", "latency.json"))])
    tree = json.loads((bundle / name).read_bytes())
    where = _mutate(tree, rng)
    (bundle / name).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8", errors="surrogatepass")
    reseal(bundle)
    return Changed(f"{name}: {where}, sealed", f"{name}:{where}")


def _record_text(bundle: Path, rng: Random) -> Changed:
    name = rng.choice([name for name in files_of(bundle) if name.endswith(("retention.json", "latency.json"))])
    text = (bundle / name).read_bytes()
    forms = {
        "no JSON": b"perplexity 1.0",
        "an object": b"{}",
        "NaN": text.replace(b'"value": ', b'"value": NaN, "x": ', 1),
        "deep": b"[" * 100_000,
        "15 MB": text.replace(b'"machine": {', b'"machine": {"x": [' + b"[]," * 5_000_000 + b"1],", 1),
        "twice": text.replace(b"{", b'{"schema": "edgedistill.retention/1",', 1),
        "empty": b"",
        "bytes": rng.randbytes(200),
        "many samples": text.replace(b'"load_ms": [', b'"load_ms": [' + b"1," * 2_000_000, 1),
    }
    how = rng.choice(sorted(forms))
    (bundle / name).write_bytes(forms[how] if forms[how] != text else b"[]")
    _reseal_any(bundle)
    return Changed(f"{name}: {how}, sealed")


def _failed(bundle: Path, rng: Random) -> Changed:
    """Whole stories: a gate that failed, another artifact's record, another target's, a speed that was not measured."""
    name = rng.choice(
        ["failed", "lower gate", "another artifact", "another target", "measured", "better", "faster", "less memory"]
    )
    retention, latency = (json.loads((bundle / f"reports/{one}.json").read_bytes()) for one in ("retention", "latency"))
    if name == "failed":
        retention["gate"]["passed"] = False
    elif name == "lower gate":
        retention["gate"]["min_retention"] = 0.01
    elif name == "another artifact":
        for rung in retention["rungs"]:
            rung["artifact_sha256"] = "7" * 64
    elif name == "another target":
        latency["target"] = "raspberry-pi-5"
    elif name == "measured":
        latency["basis"] = "measured"
    elif name == "better":
        retention["retention"]["value"] = 0.999
    elif name == "faster":
        latency["decode_tokens_per_s"] *= 3
    else:
        latency["peak_rss_bytes"] //= 2
    for one, tree in (("retention", retention), ("latency", latency)):
        (bundle / f"reports/{one}.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    reseal(bundle)
    return Changed(f"records: {name}, sealed")


def _document(bundle: Path, rng: Random) -> Changed:
    """What a person reads or runs."""
    names = [
        "MODEL_CARD.md",
        "NOTICE",
        "sbom.cdx.json",
        "reports/report.html",
        "samples/README.md",
        "samples/python/run.py",
    ]
    name = rng.choice(names)
    text = (bundle / name).read_text(encoding="utf-8")
    digits = [at for at, letter in enumerate(text) if letter.isdigit()]
    how = rng.choice(["append", "figure", "script", "word", "cut"])
    if how == "figure":
        if name.endswith(".html"):  # not in a drawing's coordinates: those are compared on no machine
            digits = [
                at
                for at in digits
                if "<svg" not in text[:at] or text.rfind("</svg>", 0, at) > text.rfind("<svg", 0, at)
            ]
        at = rng.choice(digits)
        text = text[:at] + str((int(text[at]) + rng.randint(1, 9)) % 10) + text[at + 1 :]
    elif how == "append":
        text += "\nIt is the best.\n"
    elif how == "script":
        text = "<script>alert(1)</script>" + text
    elif how == "word":
        text = text.replace("not ", "", 1) if "not " in text else text.replace("a", "b", 1)
    else:
        text = text[: len(text) // 2]
    (bundle / name).write_text(text, encoding="utf-8", newline="\n")
    _reseal_any(bundle)  # `reseal` writes the bill of materials itself
    return Changed(f"{name}: {how}, sealed")


def _tokenizer(bundle: Path, rng: Random) -> Changed:
    name = rng.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
    path = bundle / "preprocess" / name
    tree = json.loads(path.read_bytes())
    how = rng.choice(["{}", "beyond", "negative", "twice", "no json", "deep", "NaN", "claim", "swap", "huge"])
    text = ""
    if name != "tokenizer.json" or how == "claim":
        how = f"claim {_mutate(tree, rng)}"
    elif how == "{}":
        tree = {}
    elif how in ("beyond", "negative", "twice", "swap"):
        vocab = tree["model"]["vocab"]
        one, other = rng.sample(sorted(vocab), 2)
        if how == "swap":
            vocab[one], vocab[other] = vocab[other], vocab[one]
        else:
            vocab[one] = {"beyond": 10**6, "negative": -1, "twice": vocab[other]}[how]
    else:
        text = {
            "no json": "tokens",
            "deep": "[" * 100_000,
            "NaN": '{"model": NaN}',
            "huge": "[" + "[]," * 900_000 + "1]",
        }[how]
    path.write_text(text or json.dumps(tree), encoding="utf-8", errors="surrogatepass")
    _reseal_tokenizer(bundle)
    where = f"preprocess/{name}:{how.removeprefix('claim ')}" if "claim" in how else ""
    return Changed(f"preprocess/{name}: {how}, sealed", where, _seal(bundle, rng))


def _npy(bundle: Path, rng: Random) -> Changed:
    name = rng.choice([name for name in files_of(bundle) if name.endswith(".npy")])
    path = bundle / name
    data = path.read_bytes()
    header, body = data[:128], data[128:]
    forms = {
        "minus signs": header[:10] + b"-" * 9000 + b"\n" + body,
        "a pickle": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(127)
        + b"\n"
        + b"cos\nsystem\n(S'touch /tmp/attacked-ran'\ntR.",
        "terabytes": header.replace(b"(", b"(4000000000", 1),
        "fortran": header.replace(b"False", b"True ") + body,
        "big-endian": header.replace(b"<", b">", 1) + body,
        "version 2": header[:6] + b"\x02" + header[7:] + body,
        "short": data[:-4],
        "long": data + b"\0" * 4,
        "no header": body,
        "all ones": header + b"\xff" * len(body),
    }
    how = rng.choice(sorted(forms))
    path.write_bytes(forms[how])
    _seal(bundle, rng)
    return Changed(f"{name}: {how}, sealed")


def _prompt(bundle: Path, rng: Random) -> Changed:
    name = rng.choice([name for name in files_of(bundle) if name.endswith(".prompt.txt")])
    how = rng.choice(["12 MB", "no UTF-8"])
    (bundle / name).write_bytes(b"word " * 2_400_000 if how == "12 MB" else b"\xff\xfe\xfd")
    _seal(bundle, rng)
    return Changed(f"{name}: {how}, sealed")


# What only the runtime can tell


def _golden(bundle: Path, rng: Random) -> Changed:
    import numpy as np

    name = rng.choice([name for name in files_of(bundle) if name.endswith((".logits.npy", ".tokens.npy"))])
    values = np.load(bundle / name)
    at = rng.randrange(values.size)
    if name.endswith("tokens.npy"):
        values.flat[at] = (int(values.flat[at]) + rng.randint(1, 200)) % 263
    else:
        values.flat[at] += rng.choice([-1, 1]) * rng.uniform(5, 50)
    np.save(bundle / name, values)
    _seal(bundle, rng)
    return Changed(f"{name}: value {at}, sealed")


def _question(bundle: Path, rng: Random) -> Changed:
    name = rng.choice([name for name in files_of(bundle) if name.endswith(".prompt.txt")])
    (bundle / name).write_text("another question entirely", encoding="utf-8")
    _seal(bundle, rng)
    return Changed(f"{name}: another text, sealed")


def _weights(bundle: Path, rng: Random) -> Changed:
    """Gross damage to the artifact; finer faults are those of `gguf_faults.py`."""
    path = bundle / "model/model.gguf"
    data = bytearray(path.read_bytes())
    start = len(data) // 3
    how = rng.choice(["noise", "header", "cut"])
    if how == "noise":
        data[start : start + 20_000] = rng.randbytes(20_000)
    elif how == "header":
        for _ in range(20):
            data[rng.randrange(8, 2000)] ^= 1 << rng.randrange(8)
    else:
        del data[len(data) // 2 :]
    path.write_bytes(data)
    _seal(bundle, rng)
    return Changed(f"model.gguf: {how}, sealed")


def _reseal_any(bundle: Path) -> None:
    """As `reseal`, with records that may be no text."""
    tree = json.loads((bundle / MANIFEST).read_bytes())
    for entry in tree["files"]:
        data = (bundle / entry["path"]).read_bytes()
        entry["bytes"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    _write_manifest(bundle, (json.dumps(tree, indent=1) + "\n").encode())


def _reseal_tokenizer(bundle: Path) -> None:
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    )
    digest = hashlib.sha256()
    for name in names:
        if (path := bundle / "preprocess" / name).is_file():
            digest.update(f"{name}\n".encode() + path.read_bytes())
    tree = json.loads((bundle / MANIFEST).read_bytes())
    tree["student"]["tokenizer_sha256"] = digest.hexdigest()
    (bundle / MANIFEST).write_text(json.dumps(tree), encoding="utf-8")
    _reseal_any(bundle)


Kind = Callable[[Path, Random], Changed]
KINDS: tuple[tuple[float, Kind], ...] = (
    (18, _bytes), (6, _add), (5, _remove), (3, _rename), (5, _replace), (2, _beside), (3, _swap), (1, _sparse_sealed),
    (5, _sums), (7, _text), (14, _manifest_claim), (9, _record_claim), (3, _record_text), (3, _failed), (6, _document),
    (4, _tokenizer), (3, _npy), (1, _prompt), (2, _golden), (1, _question), (1, _weights),
)  # fmt: skip
NEEDS_REPLAY: tuple[Kind, ...] = (_golden, _question, _weights)
