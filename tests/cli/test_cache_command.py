"""`edgedistill teacher cache` and what `distill` and `plan` make of it, by the real command line."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from checkpoints import tiny
from command import Command, refused

TARGETS = ("-t", "phone", "--set", "distill.tokens=4096")
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
STUDENT = tuple(word for name, value in SHAPE.items() for word in ("--set", f"student.shape.{name}={value}"))


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Command:
    """A teacher's folder and its cache of samples in the folder `signals`, made by the command."""
    made = Command(tmp_path_factory.mktemp("cached"), warm=True)
    tiny(made.folder / "teacher", max_position_embeddings=256)
    done = made("teacher", "cache", *ask(made), "--json")
    assert done.returncode == 0, done.stderr
    assert "teacher signals" in done.stderr
    (made.folder / "first.json").write_text(done.stdout)
    return made


def ask(command: Command, *sets: str, url: str | None = "signals", teacher: str = "teacher") -> list[str]:
    where = [f"distill.cache.url={command.folder / url}"] if url else []
    return [
        command.recipe(), "--teacher", str(command.folder / teacher),
        *(word for each in [*where, *sets] for word in ("--set", each)),
    ]  # fmt: skip


def cached(command: Command, *sets: str, **place: str) -> list[str]:
    return [*ask(command, "distill.teacher_signals=cached", *sets, **place), *STUDENT, *TARGETS]


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.iterdir())}


def ruin(weights: Path) -> None:
    """Every weight NaN, in place: header and length stay."""
    raw = weights.read_bytes()
    head = 8 + struct.unpack("<Q", raw[:8])[0]
    weights.write_bytes(raw[:head] + b"\xff" * (len(raw) - head))


def test_it_says_what_it_made_and_a_second_run_reuses_it(command):
    first = json.loads((command.folder / "first.json").read_text())
    shards = list((command.folder / "signals").glob("shard-*.safetensors"))
    assert first["kind"] == "sampled"
    assert first["path"] == str(command.folder / "signals")
    assert first["bytes"] == sum(path.stat().st_size for path in shards) > 0
    assert first["bytes_per_token"] == pytest.approx(first["bytes"] / first["tokens"])
    before = stamps(command.folder / "signals")
    again = command("teacher", "cache", *ask(command), "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == first
    assert "teacher signals" not in again.stderr
    assert stamps(command.folder / "signals") == before


def remember(store: Path, file: Path) -> None:
    """Make the store's note of a file's hash that of what lies there now."""
    notes = [(path, json.loads(path.read_text())) for path in (store / "hashes").glob("*.json")]
    ((path, note),) = [(path, note) for path, note in notes if note["path"] == str(file)]
    stat = file.stat()
    path.write_text(json.dumps(note | {"stamp": [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]}))


def test_distill_learns_from_the_cache_without_the_teacher(command):
    """The teacher's weights become NaN after the cache was made; what runs it can only fail."""
    kept = command.folder / "kept"
    weights = command.folder / "teacher" / "model.safetensors"
    shutil.copy2(weights, kept)
    try:
        ruin(weights)
        # its content is taken to be what it was: the hash is remembered, as if nothing had been written since
        remember(command.folder / "store", weights)
        before = stamps(command.folder / "signals")
        made = command("distill", *cached(command), "--json")
        assert made.returncode == 0, made.stderr
        student = json.loads(made.stdout)["student"]
        assert student["signals"] == "cached, sampled"
        assert student["training"]["history"][-1]["forward_kl"] > 0
        assert stamps(command.folder / "signals") == before
        live = command("distill", *ask(command, "distill.teacher_signals=live"), *STUDENT, *TARGETS)
        assert live.returncode != 0
        assert "nan" in live.stderr
    finally:
        shutil.copy2(kept, weights)


def test_without_a_url_the_cache_lies_in_the_store_and_is_found_there(command):
    first = command.json("teacher", "cache", *ask(command, "distill.cache.kind=topk", url=None))
    assert Path(first["path"]).is_relative_to(command.folder / "store" / "records" / "signals")
    again = command("distill", *cached(command, "distill.cache.kind=topk", url=None), "--json")
    assert again.returncode == 0, again.stderr
    assert "teacher signals" not in again.stderr.replace("teacher signals cached", "")
    assert json.loads(again.stdout)["student"]["signals"] == "cached, topk"


@pytest.mark.parametrize(
    ("sets", "reason"),
    [
        (["distill.temperature=2.0"], "temperature is 1.0 there and 2.0 here"),
        (["distill.context_tokens=32"], "context_tokens is 64 there and 32 here"),
        (["distill.cache.draws=12"], "draws is 50 there and 12 here"),
        (["distill.cache.kind=dense"], "kind is 'sampled' there and 'dense' here"),
        (["distill.attention=documents"], "attention is 'packed' there and 'documents' here"),
    ],
)
def test_plan_refuses_a_cache_that_lies_there_for_something_else(command, sets, reason):
    refused(command("plan", *cached(command, *sets)), "was made for something else", reason, "distill.cache.url")


def test_distill_refuses_the_cache_of_another_text(command):
    """`plan` does not know a text before it was prepared."""
    refused(command("distill", *cached(command, "data.min_document_chars=400")), "data_sha256 is", "sequences is")


def test_plan_and_distill_refuse_the_cache_of_another_teacher_or_tokenizer(command):
    tiny(command.folder / "other", max_position_embeddings=256, seed=1)
    for verb in ("plan", "distill"):
        refused(command(verb, *cached(command, teacher="other")), "teacher_weights_sha256 is")
    shutil.copytree(command.folder / "teacher", command.folder / "respelt", dirs_exist_ok=True)
    path = command.folder / "respelt" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 128}))
    refused(command("plan", *cached(command, teacher="respelt")), "tokenizer_sha256 is")


def test_a_shard_cut_short_is_refused_and_stays_as_it_is(command):
    shutil.copytree(command.folder / "signals", command.folder / "torn")
    shard = next((command.folder / "torn").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-8])
    before = stamps(command.folder / "torn")
    for verb in (["teacher", "cache"], ["distill"]):
        words = ask(command, url="torn") if verb[0] == "teacher" else cached(command, url="torn")
        refused(command(*verb, *words), "damaged", "bytes, not", "remove the cache and build it again")
    assert stamps(command.folder / "torn") == before


@pytest.mark.parametrize("kind", ["sampled", "topk"])
def test_losses_that_a_cache_cannot_teach_are_refused_before_any_work(command, kind):
    sets = ["distill.jsd=1.0", f"distill.cache.kind={kind}"]
    for words in (["plan", *cached(command, *sets, url="new")], ["teacher", "cache", *ask(command, *sets, url="new")]):
        refused(command(*words), f"distill.cache.kind is {kind}", "distill.jsd is 1", "hidden or dense")
    assert not (command.folder / "new").exists()


def test_plan_takes_the_cache_that_lies_there_for_this_recipe(command):
    done = command("plan", *cached(command), "--json")
    assert done.returncode == 0, done.stderr
