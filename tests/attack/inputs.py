"""Hostile inputs by the command line, seeded: recipes, profiles, options, paths, model folders, data, stores, streams.

`cases(seed, count)` gives them; `check(ended, case, folder)` says what was wrong with how one ended. Whatever the input,
a command ends by itself within its bounds, with an exit code that says whose fault it was, no traceback, a short
message that prints, and nothing left behind.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attack.command_server import Ended, Server
from attack.odd_values import (
    BYTES,
    KINDS,
    ODD,
    PATHS,
    RAW,
    json_with_raw,
    lay_paths,
    mutate_bytes,
    mutate_tree,
    replace_kind,
)

CODES = frozenset({0, 2, 3, 4, 5})
MAX_WALL_S = 20.0  # on an idle machine; more where it is busy
MAX_CPU_S = 20.0
MAX_PEAK_BYTES = 2 << 30
MAX_ERROR_LINES = 12
NOWHERE = {"EDGEDISTILL_STORE": "/proc/nowhere/store"}  # a build that gets as far as its first record ends there
LEFT_BEHIND = re.compile(r"^\.|\.tmp$|\.partial$")
_COMMAND = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Good:
    """What the mutations start from: a model folder, an exported artifact, a text, a recipe, a profile."""

    model: Path
    text: Path
    recipe: dict[str, Any]
    profile: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One command. `setup` lays what it reads into its folder; `streams`: see Server."""

    name: str
    words: list[str]
    setup: Callable[[Path], None] = lambda folder: None
    environment: dict[str, str] = field(default_factory=dict)
    streams: str = ""


def cases(good: Good, seed: int, count: int) -> Iterator[Case]:
    """`count` cases, the same for one seed, of all families in turn."""
    families = [_recipes, _sets, _profiles, _configs, _model_files, _data, _paths, _options, _stores, _streams]
    rng = random.Random(seed)
    for number in range(count):
        yield families[number % len(families)](good, random.Random(rng.random()), number)


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    def setup(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return setup


def _as_yaml(tree: Any, rng: random.Random) -> bytes:
    """A tree as flow YAML, which JSON is, now and then changed as text."""
    raw = json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return mutate_bytes(raw, rng) if rng.random() < 0.3 else raw


def _recipes(good: Good, rng: random.Random, number: int) -> Case:
    kind = rng.randrange(5)
    if kind == 0:
        content = mutate_bytes(json.dumps(good.recipe, indent=1).encode(), rng)
    elif kind == 1:
        content = json_with_raw(good.recipe, rng)
    elif kind == 2:
        content = rng.choice(RAW).encode("utf-8", "surrogatepass")
    elif kind == 3:
        content = BYTES[rng.choice(list(BYTES))](rng)
    else:
        content = _as_yaml(mutate_tree(good.recipe, rng), rng)
    command = rng.choice([["recipes", "show"], ["plan"], ["plan"], ["build"], ["distill"], ["teacher", "cache"]])
    target = [] if command[0] in ("recipes", "teacher") else ["-t", rng.choice(["phone", "jetson", "cpu-x86"])]
    return Case(f"{number} recipe {kind}", [*command, "r.yaml", *target], _write("r.yaml", content), NOWHERE)


def _fields(tree: Any, path: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _fields(value, f"{path}{key}.")
        yield f"{path}{key}"


def _sets(good: Good, rng: random.Random, number: int) -> Case:
    def one() -> str:
        path = rng.choice(list(_fields(good.recipe)))
        kind = rng.randrange(8)
        if kind == 0:
            return rng.choice(["", "=", "=1", path, f".{path}=1", f"{path}.=1", f"{path}..x=1", f"{path}.x.y=1"])
        if kind == 1:
            return f"{'a.' * rng.choice([10, 5000])}b=1"
        if kind == 2:
            return f"{path}={rng.choice(RAW)[:20_000]}".replace("\0", "")
        if kind == 3:
            return f"{path}={rng.choice(PATHS)}"
        return f"{path}={json.dumps(rng.choice(ODD), ensure_ascii=rng.random() < 0.5)}"

    words = [word for _ in range(rng.choice([1, 1, 2, 3])) for word in ("--set", one())]
    if rng.random() < 0.15:
        words += words[-2:]
    command = rng.choice([["recipes", "show", "r.yaml"], ["plan", "r.yaml", "-t", "phone"], ["plan", "-t", "cpu-x86"]])
    recipe = json.dumps(good.recipe).encode()
    return Case(f"{number} set", [*command, *words], _write("r.yaml", recipe), NOWHERE)


def _profiles(good: Good, rng: random.Random, number: int) -> Case:
    kind = rng.randrange(4)
    if kind == 0:
        content = mutate_bytes(json.dumps(good.profile, indent=1).encode(), rng)
    elif kind == 1:
        content = json_with_raw(good.profile, rng)
    elif kind == 2:
        content = BYTES[rng.choice(list(BYTES))](rng)
    else:
        content = _as_yaml(mutate_tree(good.profile, rng), rng)
    words = rng.choice([["targets", "check", "p.yaml"], ["targets", "show", "./p.yaml"], ["plan", "-t", "./p.yaml"]])
    return Case(f"{number} profile {kind}", words, _write("p.yaml", content), NOWHERE)


def _model(good: Good, change: Callable[[Path], None]) -> Callable[[Path], None]:
    def setup(folder: Path) -> None:
        shutil.copytree(good.model, folder / "model")
        (folder / "text.txt").write_bytes(good.text.read_bytes())
        change(folder / "model")

    return setup


def _on_a_model(rng: random.Random) -> list[str]:
    kinds = [
        ["plan", "-t", "phone", "--teacher", "model", "--data", "text.txt"],
        ["plan", "-t", "phone", "--teacher", "model", "--student", "model", "--data", "text.txt"],
        ["build", "-t", "phone", "--teacher", "model", "--data", "text.txt"],
        ["export", "--student", "model", "--out", "made", "--quantization", "Q8_0"],
        ["export", "--student", "model", "--out", "made", "--format", "onnx", "--quantization", "INT4"],
        ["verify", "art", "--student", "model", "--data", "text.txt"],
    ]
    return rng.choices(kinds, [6, 2, 2, 2, 0.3, 1])[0]


def _configs(good: Good, rng: random.Random, number: int) -> Case:
    """config.json and the tokenizer's files as JSON of another kind."""
    name = rng.choices(
        ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"],
        [6, 3, 1, 1, 1],
    )[0]
    path = good.model / name
    tree = json.loads(path.read_bytes()) if path.is_file() else {"bos_token": "<|bos|>"}
    if name == "config.json" and rng.random() < 0.5:
        key = rng.choice([key for key, value in tree.items() if isinstance(value, int | float)])
        content = json.dumps({**tree, key: rng.choice(ODD)}).encode()
    elif rng.random() < 0.5:
        content = json.dumps(mutate_tree(tree, rng)).encode("utf-8", "surrogatepass")
    else:
        content = json_with_raw(tree, rng)
    return Case(
        f"{number} {name}", _on_a_model(rng), _model(good, lambda model: _put(model / name, content) and None), NOWHERE
    )


def _put(path: Path, content: bytes) -> bool:
    path.unlink(missing_ok=True)
    return path.write_bytes(content) > 0


def _model_files(good: Good, rng: random.Random, number: int) -> Case:
    """Files of a model folder that are another kind of thing, cut, changed, or with a header that lies."""
    names = [path.name for path in sorted(good.model.iterdir())]
    names += ["model.safetensors.index.json", "chat_template.jinja", "added_tokens.json", "adapter_config.json"]
    name = rng.choice(names + ["model.safetensors"] * 4)
    kind = rng.randrange(4)
    old = (good.model / name).read_bytes() if (good.model / name).is_file() else b"{}"

    def change(model: Path) -> None:
        if kind == 0:
            replace_kind(model / name, rng.choice(KINDS))
        elif kind == 1:
            _put(model / name, BYTES[rng.choice(list(BYTES))](rng))
        elif kind == 2 or name != "model.safetensors":
            _put(model / name, mutate_bytes(old[: 1 << 16], rng) + old[1 << 16 :])
        else:
            length = int.from_bytes(old[:8], "little")
            tree = json.loads(old[8 : 8 + length])
            header = json.dumps(mutate_tree(tree, rng)).encode() if rng.random() < 0.7 else json_with_raw(tree, rng)
            _put(model / name, len(header).to_bytes(8, "little") + header + old[8 + length :])

    return Case(f"{number} model's {name} {kind}", _on_a_model(rng), _model(good, change), NOWHERE)


def _data(good: Good, rng: random.Random, number: int) -> Case:
    suffix = rng.choice(
        [".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".md", ".ndjson.gz", ".tsv.zst", ".log"]
    )
    kind = rng.randrange(4)
    name = f"data{suffix}"
    if kind == 0:
        return Case(
            f"{number} data {suffix}", _on_data(rng, name), lambda folder: replace_kind(folder / name, rng.choice(KINDS)),
            NOWHERE,
        )  # fmt: skip
    if kind == 1:
        rows = b"".join(json.dumps({"text": f"row {i}", "n": i}).encode() + b"\n" for i in range(30))
        content = mutate_bytes(rows if suffix.startswith(".json") else b"text,n\n" + b'"a, b",1\n' * 30, rng)
    else:
        content = BYTES[rng.choice(list(BYTES))](rng)
    if suffix.endswith(".gz") and rng.random() < 0.7:
        content = mutate_bytes(gzip.compress(content), rng) if rng.random() < 0.3 else gzip.compress(content)

    def setup(folder: Path) -> None:
        place = folder / "many" if kind == 3 else folder
        place.mkdir(exist_ok=True)
        (place / name).write_bytes(content)
        if kind == 3:
            (place / "sound.txt").write_bytes(good.text.read_bytes())
            (place / "round").symlink_to(place)
            replace_kind(place / f"odd{rng.choice(['.txt', '.jsonl', '.csv'])}", rng.choice(KINDS))

    return Case(f"{number} data {suffix} {kind}", _on_data(rng, "many" if kind == 3 else name), setup, NOWHERE)


def _on_data(rng: random.Random, name: str) -> list[str]:
    words = rng.choice(
        [
            ["build", "-t", "phone", "--data", name],
            ["plan", "-t", "phone", "--data", name],
            ["teacher", "cache", "--data", name],
            ["distill", "-t", "jetson", "--data", name, "--eval-data", name],
        ]
    )
    more = [
        [], [], ["--document-separator", rng.choice(["\\x", "\\", "", "\\n", "\\u12", "\n", "é", "\\ud800", "x" * 5000])],
        ["--set", "data.max_documents=3"], ["--set", "data.streaming=true"], ["--set", "data.text_column=x"],
        ["--set", "data.min_document_chars=1000000000"],
    ]  # fmt: skip
    return [*words, *rng.choice(more)]


def _paths(good: Good, rng: random.Random, number: int) -> Case:
    path = rng.choice(PATHS)
    words: list[str]
    environment = dict(NOWHERE)
    words = rng.choice(
        [
            ["plan", path, "-t", "phone"], ["recipes", "show", path], ["targets", "check", path], ["targets", "show", path],
            ["plan", "-t", path], ["plan", "-t", "phone", "--teacher", path], ["build", "-t", "phone", "--data", path],
            ["plan", "-t", "phone", "--eval-data", path, "--data", "here.txt"], ["export", "--student", path],
            ["build", "-t", "phone", "--student", path, "--teacher", path], ["bundle", "verify", path], ["report", path],
            ["bench", path, "-t", "phone"], ["verify", path, "--student", path, "--data", path], ["report", "x", "-o", path],
            ["export", "--student", "model", "--calibration", path], ["export", "--student", "model", "--converter", path],
            ["export", "--student", "model", "--out", path], ["build", "-t", "phone", "--out", path],
            ["plan", "-t", "phone", "--set", f"distill.cache.url={json.dumps(path)}"], ["build", "--on", path, "-t", "phone"],
            ["bundle", path, "-t", "phone"], ["teacher", "cache", path], ["store", "prune", "--stage", path],
            ["plan", "-t", "phone", "--set", f"distill.cache.url={json.dumps(path)}", "--set", "distill.teacher_signals=cached"],
        ]
    )  # fmt: skip
    if rng.random() < 0.25:
        name = rng.choice(["EDGEDISTILL_STORE", "XDG_CACHE_HOME", "HOME", "TMPDIR", "HF_HOME"])
        environment = {name: path, **({} if name == "EDGEDISTILL_STORE" else {"EDGEDISTILL_STORE": ""})}
        words = rng.choice([["store", "list"], ["store", "verify"], ["store", "prune"], ["plan", "-t", "phone"], ["doctor"],
                            ["store", "adopt"], ["plan", "-t", "phone", "--data", "here.txt"]])  # fmt: skip
        if words == ["doctor"] and rng.random() < 0.8:
            words = ["store", "list"]

    def setup(folder: Path) -> None:
        lay_paths(folder)
        if "model" in words:
            shutil.copytree(good.model, folder / "model")

    return Case(f"{number} path {path[:30]!r}", words, setup, environment)


def _options(good: Good, rng: random.Random, number: int) -> Case:
    junk = [
        "",
        "x",
        "-1",
        "0",
        "nan",
        "inf",
        "1e999",
        "9" * 400,
        "1_0",
        "0x10",
        "１２",
        "\n",
        "é",
        "--",
        "-t",
        "None",
        " 1 ",
    ]
    value = rng.choice(junk)
    model = ["export", "--student", "model", "--out", "made"]
    words = rng.choice(
        [
            ["plan", "-t", value], ["build", "-t", "phone", "--min-retention", value], [*model, "--context-tokens", value],
            [*model, "--format", value], [*model, "--quantization", value], [*model, "--format", "onnx", "--task", value],
            ["store", "prune", "--older-than-days", value], ["store", "prune", "--stage", value], ["build", "--on", value],
            ["doctor", "-t", value], [value], ["plan", value], ["bundle", value], ["teacher", value], ["targets", value],
            ["plan", "-t", "phone", f"--{value}"], ["plan", "-t", "phone", "-t", "phone", "-t", value], ["store", value],
            ["store", "prune", "--all", "--stage", value], ["recipes", "show", value], ["version", value], ["plan"],
            ["plan", "-t", "phone", "--teacher", value], ["build", "-t", "phone", "--document-separator", value],
            ["targets", "list", value], ["--help", value], ["plan", "-t", "phone", "--json", value], ["report", value],
        ]
    )  # fmt: skip
    if rng.random() < 0.3:
        words.insert(
            rng.randrange(len(words) + 1), rng.choice(["--json", "-q", "--quiet", "-v", "--help", "-x", "--=", "-"])
        )
    return Case(f"{number} option", words, _model(good, lambda model: None), NOWHERE)


def _stores(good: Good, rng: random.Random, number: int) -> Case:
    record = {
        "schema": "edgedistill.record/1", "stage": "data", "key": "0" * 32, "inputs": {"versions": {}}, "result": {},
        "files": [{"path": "a.txt", "bytes": 1, "sha256": "0" * 64}], "written_unix_s": 1,
    }  # fmt: skip
    words = ["store", rng.choice(["list", "verify", "prune", "adopt"])]
    kind = rng.randrange(4)
    stage = rng.choice(["data", "teacher", "student", "export", "x", "é", "..."])

    def setup(folder: Path) -> None:
        place = folder / "store" / "records" / stage / ("0" * 32)
        place.mkdir(parents=True)
        (place / "a.txt").write_text("a")
        (folder / "store" / "work" / "teacher-00").mkdir(parents=True)
        path = place / "record.json"
        if kind == 0:
            replace_kind(path, rng.choice(KINDS))
        elif kind == 1:
            path.write_bytes(json_with_raw(record, rng))
        elif kind == 2:
            path.write_bytes(json.dumps(mutate_tree(record, rng)).encode("utf-8", "surrogatepass"))
        else:
            path.write_text(json.dumps(record))
            replace_kind(place / "a.txt", rng.choice(KINDS))
        if rng.random() < 0.3:
            replace_kind(folder / "store" / "work" / "odd", rng.choice(KINDS))

    return Case(f"{number} store {kind}", words, setup, {"EDGEDISTILL_STORE": "store"})


def _streams(good: Good, rng: random.Random, number: int) -> Case:
    words = rng.choice(
        [["targets", "list"], ["targets", "show", "jetson"], ["recipes", "show"], ["--help"], ["plan", "-t", "phone"],
         ["plan", "é.yaml", "-t", "phone"], ["store", "list"], ["version"], ["plan", "-t", "phone", "--data", "\udce9.txt"],
         ["recipes", "show", "--set", "data.source=é😀"], ["targets", "check", "é/ü.yaml"]]
    )  # fmt: skip
    odd = rng.choice(["", "x", "-1", "0", "1.5", "9" * 30, "1", "\udcff", "é", " "])
    environment = rng.choice(
        [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"WORLD_SIZE": odd}, {"RANK": odd, "WORLD_SIZE": "1"},
         {"COLUMNS": odd}, {"TERM": odd}, {"OMP_NUM_THREADS": odd}, {"HOME": odd}, {"TMPDIR": odd}, {"LANG": odd}, {}]
    )  # fmt: skip
    streams = rng.choice(["", "full", "pipe", "closed"])
    if rng.random() < 0.3:
        words = [*words, "--json"]
    return Case(f"{number} stream {streams}", words, environment={**NOWHERE, **environment}, streams=streams)


def run_case(case: Case, folder: Path, server: Server, *, slower: float = 1.0) -> list[str]:
    """Run a case in an empty folder; what was wrong with how it ended. `slower`: how much slower than idle this is."""
    case.setup(folder)
    before = {path.name for path in folder.iterdir()}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EDGEDISTILL", "PYTHON", "COV"))}
    environment = {**kept, "HF_HUB_OFFLINE": "1", **case.environment}
    for name in [name for name, value in case.environment.items() if not value]:
        del environment[name]
    ended = server(case.words, folder, environment, streams=case.streams, wall_s=MAX_WALL_S * slower)
    return check(ended, case, {path.name for path in folder.iterdir()} - before)


def check(ended: Ended, case: Case, added: set[str]) -> list[str]:
    """What was wrong with how a command ended; empty: nothing."""
    wrong = []
    if ended.timed_out:
        wrong.append(f"did not end in {ended.wall_s:.0f} s")
    elif ended.code not in CODES:
        wrong.append(f"exit code {ended.code}")
    if ended.cpu_s > MAX_CPU_S:
        wrong.append(f"{ended.cpu_s:.0f} s of CPU")
    if ended.peak_bytes > MAX_PEAK_BYTES:
        wrong.append(f"{ended.peak_bytes >> 20} MiB of memory")
    if ended.left_running:
        wrong.append("left a process running")
    for what in ("Traceback", "Warning:", "Exception ignored", "panicked"):
        if what in ended.err:
            wrong.append(f"{what} on standard error")
    lines = [line for line in ended.err.splitlines() if not line.startswith(("[", "target ", "no recipe named"))]
    if ended.code == 2 and not any(word in ended.err.lower() for word in ("error", "usage:", "missing")):
        wrong.append("no cause on standard error")
    if ended.code == 2 and "error" in ended.err and "try: " not in ended.err and "Usage" not in ended.err:
        wrong.append("no remedy")
    if len(lines) > MAX_ERROR_LINES or len(ended.err) > 6000:
        wrong.append(f"{len(lines)} lines, {len(ended.err)} characters on standard error")
    if _COMMAND.search(ended.err) or _COMMAND.search(ended.out):
        wrong.append("control characters on the terminal")
    if "--json" in case.words and ended.code == 0 and not case.streams and "--help" not in case.words:
        json.loads(ended.out)
    left = {name for name in added if LEFT_BEHIND.search(name) or (ended.code == 2 and name in ("made", "exported"))}
    if left:
        wrong.append(f"left behind {sorted(left)}")
    return [f"{case.name}: {' '.join(case.words)[:300]!r} {case.environment}: {fault}" for fault in wrong] + (
        [ended.err[-1500:]] if wrong else []
    )
