"""bitsandbytes folders through the whole flow by the command line: plan, build, verify, bench, bundle, its sample."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tiny
from command import Command, refused

from edgedistill.bench.ceiling import bytes_read_a_token
from edgedistill.config.recipe import parse_recipe
from edgedistill.config.targets import load_target
from edgedistill.errors import UserError
from edgedistill.export.stage import write_artifact
from edgedistill.fit.sizes import artifact_bytes, kv_cache_bytes, read_bytes_a_token
from edgedistill.models.shapes import shape_from_config
from edgedistill.plan.plan import plan
from edgedistill.records.shape import Shape

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
TARGET = ("-t", "server-gpu")
NF4 = ("--set", "export.artifacts=bitsandbytes:NF4")
# the tiny teacher is 64 wide: so is a student of fewer layers
STUDENT = ("--set", "student.start=layers", "--set", "student.compression=1.2")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Command, dict[str, object]]:
    command = Command(tmp_path_factory.mktemp("built"), warm=True)
    return command, command.json("build", command.recipe(), *TARGET, *NF4, *STUDENT)


def bundle_of(command: Command) -> Path:
    return command.folder / "bundles" / "tiny-server-gpu"


def test_every_rung_is_scored_and_the_speed_is_a_proxy(built) -> None:
    _, document = built
    artifacts = document["bundles"][0]["artifacts"]
    assert len(artifacts) == 1
    for artifact in artifacts:
        rungs = {rung["rung"]: rung for rung in artifact["retention"]["rungs"]}
        assert list(rungs) == ["teacher", "student", "quantized", "shipped"]
        assert rungs["shipped"]["perplexity"] == pytest.approx(rungs["quantized"]["perplexity"], rel=0.05)
        assert "transformers" in rungs["shipped"]["runtime"] and "bitsandbytes" in rungs["shipped"]["runtime"]
        assert artifact["retention"]["tokenizer"]["mismatches"] == 0
        latency = artifact["latency"]
        assert latency["basis"] == "proxy" and latency["measured_on"]["runtime"] == "transformers"
        assert any("this machine is not known to be server-gpu" in note for note in latency["notes"])
        assert any("the target's GPU was not used" in note for note in latency["notes"])
        assert any("KV cache of 16 tokens" in note for note in latency["notes"])
        assert latency["ceiling"]["basis"] == "derived"


def test_the_bundle_verifies_and_says_what_it_holds(built) -> None:
    command, _ = built
    check = command.json("bundle", "verify", str(bundle_of(command)))
    assert check["golden_replayed"] >= 1  # of the prompts that damaged tokens fail
    assert all(replay["largest_deviation"] <= replay["tolerance"] for replay in check["replays"])
    manifest = json.loads((bundle_of(command) / "manifest.json").read_text())
    assert [(a["format"], a["quantization"], a["runtime"]) for a in manifest["artifacts"]] == [
        ("bitsandbytes", "NF4", "transformers")
    ]
    first = manifest["artifacts"][0]
    assert [t["name"] for t in first["inputs"]] == ["input_ids"] and first["outputs"][0]["dtype"] == "bfloat16"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file["path"] for file in first["files"]}
    assert manifest["tool_versions"]["bitsandbytes"]
    assert any("speed and memory are proxy" in note for note in manifest["basis_notes"])


def test_an_altered_weight_is_found(built, tmp_path: Path) -> None:
    import shutil

    command, _ = built
    copy = Path(shutil.copytree(bundle_of(command), tmp_path / "tiny-server-gpu"))
    weights = copy / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(command("bundle", "verify", str(copy)), "model/model.safetensors")


def test_the_sample_writes_text(built) -> None:
    command, _ = built
    done = subprocess.run(
        [sys.executable, "samples/python/run.py", "the old dog", "--tokens", "5"], cwd=bundle_of(command),
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the old dog") and len(done.stdout.strip()) > len("the old dog")
    assert "tokens in" in done.stderr
    assert "pip install torch transformers" in (bundle_of(command) / "samples" / "README.md").read_text()


def test_a_second_build_takes_all_from_the_store(built) -> None:
    command, _ = built
    done = command("build", command.recipe(), *TARGET, *NF4, *STUDENT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("(from the store)") == 5  # data, student, export, verify, bench


@pytest.mark.parametrize("quantization", ["NF4", "INT8"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_predicted_bytes_are_those_of_the_file(tmp_path: Path, quantization: str, tied: bool) -> None:
    checkpoint = tiny(
        tmp_path / "model", hidden_size=128, intermediate_size=256, head_dim=32, vocab_size=512, num_hidden_layers=3,
        tie_word_embeddings=tied,
    )  # fmt: skip
    made = write_artifact(
        checkpoint, tmp_path / "out", format_="bitsandbytes", quantization=quantization, context_tokens=128, name="x"
    )
    shape = shape_from_config(json.loads((checkpoint / "config.json").read_text()), where="x")
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    tokens = 65 * shape.vocab_size
    assert artifact_bytes(shape, "bitsandbytes", quantization) - tokens == pytest.approx(weights, rel=0.02)
    read = bytes_read_a_token(made, tmp_path / "out", context_tokens=64)
    assert read_bytes_a_token(shape, "bitsandbytes", quantization) == pytest.approx(read.weights, rel=0.02)
    assert kv_cache_bytes(shape, 64, "bitsandbytes", quantization) == read.kv_cache
    assert bool(read.left_out) is not tied


def test_a_plan_of_nf4_designs_widths_that_it_takes() -> None:
    teacher = Shape(
        vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    recipe = parse_recipe("{}", where="x", overrides=["export.artifacts=bitsandbytes:NF4", "student.start=fresh"])
    planned = plan(recipe, [load_target("server-gpu")], teacher=teacher)
    shape = planned.student
    widths = np.array([shape.hidden_size, shape.intermediate_size, shape.num_attention_heads * shape.head_dim])
    assert not (widths % 64).any()
    figures = planned.artifacts[0]
    assert figures.artifact == "bitsandbytes:NF4" and figures.artifact_bytes.basis == "derived"
    assert "BF16" in figures.kv_cache_bytes.source


def test_what_cannot_be_is_refused_before_any_work(built, tmp_path: Path) -> None:
    command, _ = built
    words = ("plan", command.recipe(), *TARGET)
    refused(command(*words, "--set", "export.artifacts=bitsandbytes:FP4"), "has no quantization 'FP4'")
    refused(
        command(*words, *NF4, "--set", "student.start=fresh", "--set", "student.shape.hidden_size=32"),
        "matrices with 32 columns", "multiples of 64",
    )  # fmt: skip
    refused(command(*words, *NF4, *STUDENT, "--set", "distill.qad.tokens_share=0.1"), "is not imitated in training")
    refused(command("plan", command.recipe(), "-t", "jetson", *NF4), "does not run bitsandbytes:NF4")
    refused(command(*words, "--set", "export.artifacts=executorch:FP32"), "executorch:FP32 can only be exported")


def test_a_profile_may_not_smuggle_in_what_no_build_follows() -> None:
    target = load_target("server-gpu")
    values = target.model_dump() | {
        "runtimes": [*target.runtimes, "executorch"],
        "allowed_artifacts": [*target.allowed_artifacts, "executorch:FP32", "onnx:INT8-DYNAMIC"],
    }
    allowing = type(target).model_validate(values)
    recipe = parse_recipe("{}", where="x", overrides=["export.artifacts=executorch:FP32"])
    teacher = Shape(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    with pytest.raises(UserError, match="executorch:FP32 can only be exported"):
        plan(recipe, [allowing], teacher=teacher)


@pytest.mark.parametrize("words", [("verify",), ("bench", "-t", "phone")])
def test_an_executorch_program_is_neither_verified_nor_timed(built, tmp_path: Path, words: tuple[str, ...]) -> None:
    """A record as `export` writes it: no interpreter is needed to refuse it."""
    from edgedistill.records.artifact import Artifact
    from edgedistill.store import combined_sha256, file_entries

    command, _ = built
    model = tiny(tmp_path / "model")
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "model.pte").write_bytes(b"program")
    files = file_entries(folder)
    record = Artifact(
        format="executorch", quantization="FP32", runtime="executorch", entry="model.pte", files=files, bytes=7,
        sha256=combined_sha256(files), parameters=1, bits_per_weight=32.0, tensor_types={}, context_tokens=128,
        vocab_size=400, tool_versions={},
    )  # fmt: skip
    (folder / "artifact.json").write_text(record.model_dump_json())
    text = command.folder / "text.txt"
    more = ("--set", "bench.prompt_tokens=8")
    if words[0] == "verify":
        more = ("--student", str(model), "--data", str(text))
    done = command(words[0], str(folder), *words[1:], *more, "--set", "bench.new_tokens=8")
    refused(done, "executorch cannot be run here")
