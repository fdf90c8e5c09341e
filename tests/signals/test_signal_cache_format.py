"""docs/signal-cache.md against the files: a reader written from that page alone reads what the program wrote.

Nothing of edgedistill's own reader or codec is used to decode here.
"""

from __future__ import annotations

import ast
import json
import re
import struct
from itertools import pairwise
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from test_signal_cache import DRAWS, KEY, TOP_K, build
from training_models import VOCAB, model, packed

from edgedistill.losses.losses import Head
from edgedistill.signals import multiset
from edgedistill.signals.cache import Produced, build_cache
from edgedistill.signals.cache_files import SCHEMA
from edgedistill.signals.cache_reader import open_cache
from edgedistill.signals.signals import LiveSignals, produce_from

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "signal-cache.md").read_text(encoding="utf-8")


def table(title: str) -> list[list[str]]:
    """The rows of the first table below a heading."""
    text = PAGE.split(f" {title}\n", 1)[1]
    lines = re.search(r"^\| --- .*\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert lines, title
    return [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in lines[1].splitlines()]


def bits_of(most: int) -> int:
    """⌈log2 most⌉"""
    return (most - 1).bit_length()


class Bits:
    """A sequence's bits as one integer, read from the least significant."""

    def __init__(self, words: list[int], first: int) -> None:
        self.all = sum(word << (64 * i) for i, word in enumerate(words)) >> first

    def take(self, size: int) -> int:
        value = self.all & ((1 << size) - 1)
        self.all >>= size
        return value

    def unary(self) -> int:
        zeros = 0
        while not self.take(1):
            zeros += 1
        return zeros


def unrank(rank: int, size: int) -> list[int]:
    found = []
    for j in range(size, 0, -1):
        c = j - 1
        while comb(c + 1, j) <= rank:
            c += 1
        found.append(c)
        rank -= comb(c, j)
    return found[::-1]


def decode(bits: Bits, tokens: int, n: int, vocab: int) -> list[dict[int, int]]:
    """Section "The bits of a sample", step by step."""
    r = bits.take(3)
    w = (min(n, vocab) - 1).bit_length()
    k = [bits.take(r) + 1 for _ in range(tokens)]
    if r < w:
        k = [low + (bits.unary() << r) for low in k]
    made = []
    for each in k:
        cuts = unrank(bits.take(bits_of(comb(n - 1, each - 1))), each - 1)
        edges = [-1, *cuts, n - 1]
        counts = [b - a for a, b in pairwise(edges)]
        if vocab <= 64 or each * comb(vocab, each) < 2**63:
            ids = unrank(bits.take(bits_of(comb(vocab, each))), each)
        else:
            low = (vocab // each).bit_length() - 1
            lows = [bits.take(low) for _ in range(each)]
            high = bits.take(each + ((vocab - 1) >> low))
            ones = [place for place in range(high.bit_length()) if high >> place & 1]
            ids = [((place - j) << low) + part for j, (place, part) in enumerate(zip(ones, lows, strict=True))]
        made.append(dict(zip(ids, counts, strict=True)))
    return made


def read(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """A safetensors file: name → dtype, shape, bytes."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: (
            entry["dtype"],
            entry["shape"],
            raw[8 + length + entry["data_offsets"][0] : 8 + length + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }


def sequences_of(folder: Path) -> list[list[dict[int, int]]]:
    record = json.loads((folder / "cache.json").read_text())
    found = []
    for shard in record["shards"]:
        tensors = read(folder / shard["name"])
        words = [each[0] for each in struct.iter_unpack("<Q", tensors["words"][2])]
        begins = [each[0] for each in struct.iter_unpack("<q", tensors["first_bit"][2])]
        for begin, end in pairwise(begins):
            bits = Bits(words[begin // 64 : -(-end // 64)], begin % 64)
            found.append(decode(bits, record["context"], record["draws"], record["vocab"]))
    assert len(found) == record["sequences"]
    return found


def test_the_example_of_the_page():
    (word,) = re.findall(r"^The word is `(0x[0-9a-f]+)`", PAGE, re.MULTILINE)
    drawn = [{3: 1, 7: 3}, {5: 4}]
    assert decode(Bits([int(word, 16)], 0), 2, 4, 10) == drawn
    words, bits = multiset.encode(np.array([[3, 7], [5, 0]]), np.array([[1, 3], [4, 0]]), draws=4, vocab=10)
    assert [hex(each) for each in words] == [word]
    rows = [row for row in table("The bits of a sample") if row[0] != "(none)"]
    assert bits == int(rows[-1][0].split(" to ")[1]) + 1
    at = 0
    for place, _, value in rows:
        first, _, last = place.partition(" to ")
        assert int(first) == at
        at = int(last or first) + 1
        if value.isdigit():
            assert int(word, 16) >> int(first) & ((1 << (at - int(first))) - 1) == int(value)


@pytest.mark.parametrize(("vocab", "spread"), [(4096, 2.0), (4096, 12.0), (70_000, 4.0)])
def test_a_reader_written_from_the_page_reads_what_was_written(tmp_path, vocab, spread):
    """Confident teachers and vague ones: ranked and Elias-Fano ids, Rice-coded and plain counts of ids."""
    generator = torch.Generator().manual_seed(3)
    head = Head(torch.randn(vocab, 16, generator=generator) / 4)
    hidden = spread * torch.randn(6, 12, 16, generator=generator)

    def produce(rows):
        counted = torch.ones(len(rows), 12, dtype=torch.bool)
        return Produced(hidden[torch.from_numpy(rows)], head, {}, {}, counted)

    folder = tmp_path / "c"
    build_cache(
        str(folder), key=KEY, kind="sampled", vocab=vocab, sequences=6, context=12, temperature=1.0, draws=DRAWS,
        top_k=0, seed=1, produce=produce,
    )  # fmt: skip
    theirs = sequences_of(folder)
    ours = open_cache(str(folder), key=KEY).batch(np.arange(6))
    drawn = [token for sequence in theirs for token in sequence]
    for token, ids, weights in zip(drawn, ours.ids.tolist(), ours.weights.tolist(), strict=True):
        assert token == {i: round(w * DRAWS) for i, w in zip(ids, weights, strict=True) if w > 0}
        assert sum(token.values()) == DRAWS
    # and what was drawn is the teacher's: seldom an id that it would hardly ever give
    p = torch.softmax(hidden.to(torch.bfloat16).float().flatten(0, 1) @ head.weight.T, -1)
    assert all(p[row, i] > 1e-9 for row, token in enumerate(drawn) for i in token)


@pytest.mark.parametrize("kind", ["sampled", "topk", "dense", "hidden"])
def test_the_tensors_are_those_of_the_page(tmp_path, kind):
    teacher = model(seed=5, hidden=48)
    given = produce_from(
        LiveSignals(teacher, low_precision=False), packed(), documents=False, hidden_layers=[1], attention_layers=[0]
    )
    build(tmp_path / "c", kind, produce=given, hidden_layers=[1], attention_layers=[0])
    record = json.loads((tmp_path / "c" / "cache.json").read_text())
    tensors = read(tmp_path / "c" / record["shards"][0]["name"])
    sizes = {
        "S": record["sequences"], "T": record["context"], "V": VOCAB, "K": TOP_K, "H": 48, "A": 2,
        "W": len(tensors["words"][2]) // 8 if kind == "sampled" else 0, "S + 1": record["sequences"] + 1,
    }  # fmt: skip
    documented = {
        name.strip("`").replace("hidden.i", "hidden.1").replace("attention.i", "attention.0"): (
            dtype, [sizes[size.strip()] for size in shape.strip("[]").split(",")]
        )
        for of, name, dtype, shape, _ in table("Tensors")
        if of.strip("`") in (kind, "any")
    }  # fmt: skip
    assert documented == {name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()}


def test_the_record_has_the_fields_of_the_page(tmp_path):
    build(tmp_path / "c", "sampled")
    record = json.loads((tmp_path / "c" / "cache.json").read_text())
    assert [row[0].strip("`") for row in table("cache.json")] == list(record)
    assert f"`{SCHEMA}`" in PAGE
    assert f"`{record['schema']}`" in PAGE


def test_every_field_of_the_key_is_on_the_page():
    root = Path(__file__).resolve().parents[2] / "edgedistill"
    names = set()
    for file, function in (("signals/cache_files.py", "recipe_key"), ("teacher/cached.py", "cache_key")):
        tree = ast.parse((root / file).read_text(encoding="utf-8"))
        (found,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function]
        names |= {key.value for n in ast.walk(found) if isinstance(n, ast.Dict) for key in n.keys}
    assert len(names) > 15
    listed = PAGE.split("The key is compared field by field", 1)[1].split("Refused are also", 1)[0]
    assert set(re.findall(r"`(\w+)`", listed)) == names
