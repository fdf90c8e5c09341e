"""A store that somebody wrote into, by the real command line: nothing of it is believed, exported or printed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from command import Command
from safetensors.numpy import load_file, save_file

from edgedistill.errors import UserError
from edgedistill.export.stage import export_model
from edgedistill.models.folder import open_model, require_weights, tokenizer_sha256, weights_sha256
from edgedistill.store import Store, sha256_of


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Command:
    command = Command(tmp_path_factory.mktemp("built"), warm=True)
    done = command("build", command.recipe(), "-t", "phone", "--json")
    assert done.returncode == 0, done.stderr
    (command.folder / "first.json").write_text(done.stdout)
    return command


def record_of(command: Command, stage: str) -> Path:
    (folder,) = (command.folder / "store" / "records" / stage).iterdir()
    return folder


def shipped(document: str) -> dict:
    return json.loads(document)["bundles"][0]["artifacts"][0]["retention"]["rungs"][-1]


def test_an_edited_retention_is_measured_again(built):
    record = record_of(built, "verify") / "record.json"
    tree = json.loads(record.read_text())
    tree["result"]["retention"]["value"] = 0.99
    tree["result"]["rungs"][-1]["perplexity"] = 1.0
    record.write_text(json.dumps(tree))
    checked = built("store", "verify")
    assert checked.returncode == 2 and "content changed" in checked.stderr + checked.stdout
    done = built("build", built.recipe(), "-t", "phone", "--json")
    assert done.returncode == 0, done.stderr
    assert "is not whole, and is made again" in done.stderr
    assert shipped(done.stdout) == shipped((built.folder / "first.json").read_text())
    assert built("store", "verify").returncode == 0


def test_a_zeroed_layer_in_the_store_is_not_exported(built):
    weights = record_of(built, "student") / "model" / "model.safetensors"
    before = weights.stat()
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("layers.0.mlp.down_proj.weight"))
    tensors[name] = np.zeros_like(tensors[name])
    save_file(tensors, weights, metadata={"format": "pt"})
    assert weights.stat().st_size == before.st_size
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    # another artifact of the same student: it must be exported from the student's own bytes
    asked = ("build", built.recipe(), "-t", "phone", "--set", "export.artifacts=gguf:Q8_0", "--out", "again", "--json")
    done = built(*asked)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors: content changed" in done.stderr
    first = json.loads((built.folder / "first.json").read_text())
    again = json.loads(done.stdout)
    assert again["student"]["weights_sha256"] == first["student"]["weights_sha256"]
    rungs = [document["bundles"][0]["artifacts"][0]["retention"]["rungs"] for document in (first, again)]
    assert rungs[0][1]["perplexity"] == pytest.approx(rungs[1][1]["perplexity"], rel=1e-6)
    assert built("store", "verify").returncode == 0


def test_weights_that_change_under_a_stage_are_refused(built, tmp_path):
    folder, store = tmp_path / "model", Store(tmp_path / "store")
    source = record_of(built, "student") / "model"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    asked = weights_sha256(open_model(str(folder)), store)
    require_weights(folder, asked, store, role="student")
    weights = folder / "model.safetensors"
    before = weights.stat()
    with weights.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match="were changed"):
        export_model(
            folder, "gguf:F16", context_tokens=64, name="x", weights_sha256=asked,
            tokenizer_sha256=tokenizer_sha256(folder), store=store,
        )  # fmt: skip
    assert not list((tmp_path / "store").glob("records/export/*"))


def test_a_record_that_is_not_of_its_files_is_refused(built, tmp_path):
    """Bytes that changed, the record's hash of the file made to fit, that of all files left: nothing is reused."""
    student = record_of(built, "student") / "model"
    out = tmp_path / "out"
    done = built("export", "--student", str(student), "--format", "gguf", "--quantization", "F16", "--out", str(out))
    assert done.returncode == 0, done.stderr
    words = (
        "verify",
        str(out),
        "--student",
        str(student),
        "--data",
        str(built.folder / "text.txt"),
        "--min-retention",
        "0",
    )
    fast = ("--set", "verify.max_tokens=2000", "--set", "data.min_document_chars=200", "--min-retention", "0")
    first = built(*words, *fast)
    assert first.returncode == 0, first.stderr
    record = json.loads((out / "artifact.json").read_text())
    model = out / record["entry"]
    data = bytearray(model.read_bytes())
    data[-4096:] = bytes(4096)
    model.write_bytes(data)
    record["files"][0]["sha256"] = sha256_of(model)
    (out / "artifact.json").write_text(json.dumps(record))
    again = built(*words, *fast)
    assert again.returncode == 2 and "disagrees with itself" in again.stderr
    record["sha256"] = record["files"][0]["sha256"]
    record["entry"] = "artifact.json"
    (out / "artifact.json").write_text(json.dumps(record))
    named = built(*words, *fast)
    assert named.returncode == 2 and "not one of its files" in named.stderr
