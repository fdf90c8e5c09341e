"""Models and settings that cannot become an artifact: a few lines by the command line, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import copy, edit_json, tiny
from command import Command, refused
from encoders import tiny_encoder

# format, quantization, and the checkpoint that it is made of
FORMATS = {
    "gguf": ("gguf", "Q8_0", "decoder"),
    "onnx": ("onnx", "INT4", "decoder"),
    "encoder": ("onnx", "FP32", "encoder"),
    "bitsandbytes": ("bitsandbytes", "INT8", "decoder"),
    "executorch": ("executorch", "FP32", "decoder"),
}
DECODERS = [name for name in FORMATS if name != "encoder"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "decoder": tiny(root / "decoder", tie_word_embeddings=True),
        "untied": tiny(root / "untied"),
        "encoder": tiny_encoder(root / "encoder", "bert"),
    }


def set_value(folder: Path, ending: str, value: float) -> None:
    """The first value of the first matrix whose name ends so."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(ending))
    changed = np.array(tensors[name])
    changed.reshape(-1)[0] = value
    save_file(tensors | {name: changed}, folder / "model.safetensors", metadata={"format": "pt"})


def not_a_number(folder: Path) -> None:
    set_value(folder, ("up_proj.weight", "intermediate.dense.weight")[folder.name == "encoder"], float("nan"))


def infinite(folder: Path) -> None:
    set_value(folder, ("down_proj.weight", "output.dense.weight")[folder.name == "encoder"], float("inf"))


def unknown_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["MambaForCausalLM"], model_type="mamba")


def larger_vocabulary(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        {"id": 400, "content": "<extra>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def another_head(folder: Path) -> None:
    """Of the untied model, whose two matrices differ."""
    edit_json(folder / "config.json", tie_word_embeddings=True)


DAMAGES: dict[Callable[[Path], None], tuple[str, tuple[str, ...]]] = {
    not_a_number: ("NaN or infinite", tuple(FORMATS)),
    infinite: ("NaN or infinite", ("gguf", "encoder", "bitsandbytes")),
    unknown_architecture: ("amba", tuple(FORMATS)),
    larger_vocabulary: ("400", tuple(FORMATS)),
    another_head: ("tie_word_embeddings is true, but lm_head.weight differs", tuple(DECODERS)),
}


def run_export(folder: Path, checkpoint: Path, format_: str, quantization: str, *words: str) -> Any:
    command = Command(folder, {"EDGEDISTILL_EXECUTORCH_PYTHON": "/bin/false"}, warm=True)
    return command(
        "export", "--student", str(checkpoint), "--format", format_, "--quantization", quantization, "--out",
        str(folder / "parent" / "out"), *words,
    )  # fmt: skip


def nothing_left(folder: Path) -> None:
    parent = folder / "parent"
    assert not parent.exists() or list(parent.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "name"), [(damage, name) for damage, (_, names) in DAMAGES.items() for name in names],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)  # fmt: skip
def test_a_damaged_model_is_refused(
    damage: Callable[[Path], None], name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    format_, quantization, kind = FORMATS[name]
    if damage is larger_vocabulary and kind == "encoder":
        said = "embedding 200 rows"
    else:
        said = DAMAGES[damage][0]
    checkpoint = copy(checkpoints["untied" if damage is another_head else kind], tmp_path / kind)
    damage(checkpoint)
    refused(run_export(tmp_path, checkpoint, format_, quantization), said)
    nothing_left(tmp_path)


WIDTHS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "NF4 of 96 columns": ({}, "bitsandbytes", "NF4", "takes 96 inputs"),
    "8DA4W of 80 columns": ({"intermediate_size": 80}, "executorch", "8DA4W", "matrices with 80 columns"),
    "heads of 20": ({"head_dim": 20}, "onnx", "INT4", "heads of 20"),
    "FP16 of a decoder": ({}, "onnx", "FP16", "cannot decode an FP16 graph"),
    "dynamic INT8 of a decoder": ({}, "onnx", "INT8-DYNAMIC", "INT8-DYNAMIC"),
    "a type of another format": ({}, "gguf", "NF4", "gguf has no quantization 'NF4'"),
    "importance without text": ({}, "gguf", "IQ2_XS", "importance matrix"),
}


@pytest.mark.parametrize("case", WIDTHS)
def test_a_quantization_that_cannot_be_is_refused(case: str, tmp_path: Path) -> None:
    changes, format_, quantization, said = WIDTHS[case]
    checkpoint = tiny(tmp_path / "model", **changes)
    refused(run_export(tmp_path, checkpoint, format_, quantization), said)
    nothing_left(tmp_path)


def test_a_width_that_a_k_quant_does_not_allow_gets_a_named_fallback(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "model", hidden_size=96, intermediate_size=96, head_dim=24)
    done = run_export(tmp_path, checkpoint, "gguf", "Q4_K_M", "-v", "--set", "export.compare_speed=false")
    assert done.returncode == 0, done.stderr
    assert "instead of Q4_K: 96 columns are not a multiple of 256" in done.stderr
    record = json.loads((tmp_path / "parent" / "out" / "artifact.json").read_text())
    assert {fallback["wanted"] for fallback in record["fallbacks"]} >= {"Q4_K"}


def test_what_the_targets_runtime_cannot_run_is_refused_by_the_plan(tmp_path: Path) -> None:
    command = Command(tmp_path, warm=True)
    for artifact, target, said in (
        ("onnx:FP16", "phone", "onnx:FP16"),
        ("bitsandbytes:INT8", "jetson", "does not run bitsandbytes:INT8"),
        ("executorch:8DA4W", "phone", "executorch:8DA4W can only be exported"),
    ):
        done = command("plan", command.recipe(), "-t", target, "--set", f"export.artifacts={artifact}")
        refused(done, said)
