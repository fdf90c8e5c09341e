"""ONNX of what is no decoder: every task, precision and refusal, in the real runtime."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from encoders import tiny_encoder, word_piece
from safetensors.torch import load_file, save_file

from edgedistill import stages
from edgedistill.errors import UserError
from edgedistill.export.stage import write_artifact
from edgedistill.onnx.encoder import export_encoder, export_module
from edgedistill.onnx.tasks import TASKS, task_of
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.artifact import Artifact
from edgedistill.runtimes.graph import GraphProcess
from edgedistill.store import Store


def operators(path: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in onnx.load(str(path), load_external_data=False).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def export(checkpoint: Path, out: Path, quantization: str = "FP32", **options: Any) -> Artifact:
    return write_artifact(
        checkpoint, out, format_="onnx", quantization=quantization, context_tokens=0, name="x",
        options=ExportOptions(**options),
    )  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("bert"), "bert")


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "vit", "resnet"])
def test_the_graph_is_fused_and_computes_what_torch_does(tmp_path: Path, kind: str) -> None:
    made = export(tiny_encoder(tmp_path / "model", kind), tmp_path / "out")
    parity = made.parity
    assert parity is not None and parity.values > 0 and parity.relative_rms < 1e-5
    found = operators(tmp_path / "out" / "model.onnx")
    if kind == "resnet":
        # Batch norms went into the convolutions.
        assert "BatchNormalization" not in found and found["Conv"] == 6
    else:
        # The last layer is computed for one token (first_token.py): its query is apart from key and value.
        assert found["Attention"] == found["MultiHeadAttention"] == 1 and "Softmax" not in found
        assert found["BiasGelu"] == 2 and found["SkipLayerNormalization"] >= 4
        # Output, up and down of two layers, and the last one's query, key with value: the first's are in Attention.
        assert found["MatMul"] == 8
    batch = [spec.shape[0] for spec in (*made.inputs, *made.outputs)]
    assert batch == ["batch"] * len(batch)
    if kind == "bert":
        assert [(spec.name, spec.shape) for spec in made.inputs] == [
            (name, ["batch", "sequence"]) for name in ("input_ids", "attention_mask", "token_type_ids")
        ]
        assert [file.path for file in made.files] == [
            "config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json",
        ]  # fmt: skip
        assert "edgedistill's own" in parity.inputs and made.context_tokens == 64


def test_the_texts_of_the_caller_are_what_it_is_compared_on(tmp_path: Path, bert: Path) -> None:
    made = export(bert, tmp_path / "out", calibration=(("the fox jumps",), ("a girl",)), calibration_source="mine.txt")
    assert made.parity is not None and made.parity.inputs.startswith("2 texts of mine.txt, 2 pairs, and of ")
    assert made.parity.values == 3 * (2 + 2 + 3)  # labels of texts, pairs and lengths


def test_an_embedding_is_pooled_and_normalised_in_the_graph(tmp_path: Path) -> None:
    checkpoint = tiny_encoder(tmp_path / "model", "bert-model")
    assert task_of(checkpoint) == "feature-extraction"
    (checkpoint / "1_Pooling").mkdir()
    (checkpoint / "2_Normalize").mkdir()
    (checkpoint / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True})
    )
    made = export(checkpoint, tmp_path / "out")
    assert made.task == "embedding" and [spec.name for spec in made.outputs] == ["sentence_embedding"]
    ids = np.array([[5, 6, 7, 8], [9, 10, 0, 0]])
    feeds = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64), "token_type_ids": np.zeros_like(ids)}
    with GraphProcess(tmp_path / "out" / "model.onnx", threads=1) as process:
        together = process.run(feeds)["sentence_embedding"]
        alone = process.run({name: value[1:, :2] for name, value in feeds.items()})["sentence_embedding"]
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(together[1:], alone, atol=1e-6)


@pytest.mark.parametrize("kind", ["t5", "marian"])
def test_text2text_decodes_as_torch_does(tmp_path: Path, kind: str) -> None:
    made = export(tiny_encoder(tmp_path / "model", kind), tmp_path / "out")
    assert made.task == "text2text" and made.parity is not None
    assert made.parity.greedy_tokens == made.parity.greedy_tokens_equal == 8
    assert made.parity.relative_rms < 5e-5  # the order of sums is the threads'; the limit is 1e-4
    assert operators(tmp_path / "out" / "encoder.onnx")["Attention"] == 2
    assert "MultiHeadAttention" in operators(tmp_path / "out" / "decoder.onnx")
    present = next(spec for spec in made.outputs if spec.name == "present_0_key")
    assert present.shape == ["batch", 2, "past + tokens", 16]


@pytest.mark.parametrize(("quantization", "kind"), [("FP16", "FLOAT16"), ("BF16", "BFLOAT16")])
def test_half_precision_halves_the_file(tmp_path: Path, bert: Path, quantization: str, kind: str) -> None:
    made = export(bert, tmp_path / "out", quantization)
    assert made.parity is not None and 1e-6 < made.parity.relative_rms < 2e-2
    assert made.tensor_types[kind] > 10 and 16 <= made.bits_per_weight < 18 and "CPU" in made.notes[0]
    assert {spec.dtype for spec in made.outputs} == {"float"}
    model = onnx.load(str(tmp_path / "out" / "model.onnx"))
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_fp16_refuses_weights_that_it_cannot_hold(tmp_path: Path, bert: Path) -> None:
    broken = changed(bert, tmp_path / "model", "bert.encoder.layer.0.output.dense.weight", 1e5)
    with pytest.raises(UserError, match="float16 ends at 65504"):
        export(broken, tmp_path / "out", "FP16")
    assert not (tmp_path / "out").exists()


def test_ort_format_runs_and_names_its_operators(tmp_path: Path, bert: Path) -> None:
    made = export(bert, tmp_path / "out", ort_format=True)
    names = [file.path for file in made.files]
    assert "model.ort" in names and "required_operators.config" in names
    text = (tmp_path / "out" / "required_operators.config").read_text()
    assert "com.microsoft;1;" in text and "Attention" in text and str(tmp_path) not in text
    assert made.parity is not None and made.parity.values == 2 * 3 * (8 + 2 + 3)  # both files; texts, pairs, lengths


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path, bert: Path) -> None:
    here = export(bert, tmp_path / "here")
    script = (
        "import sys; from pathlib import Path; from edgedistill.onnx.encoder import export_encoder;"
        "print(export_encoder(Path(sys.argv[1]), Path(sys.argv[2]), quantization='FP32').sha256)"
    )
    there = subprocess.run(
        [sys.executable, "-c", script, str(bert), str(tmp_path / "there")], check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert there.stdout.split()[-1] == here.sha256
    data = (tmp_path / "here" / "model.onnx").read_bytes()
    assert b"site-packages" not in data and str(Path.cwd()).encode() not in data


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.two = torch.nn.Linear(4, 2)

    def forward(self, image: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = torch.relu(self.norm(self.one(image))).mean((2, 3))
        return self.two(states) + offset, states


def test_any_module_is_exported_with_the_names_that_are_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Two().eval()
    made = export_module(
        module, (torch.randn(1, 3, 8, 8), torch.randn(1, 2)), tmp_path / "out",
        dynamic={"image": {0: "batch", 2: "height"}, "offset": {0: "batch"}}, input_names=["pixels", "offset"],
        output_names=["scores", "states"],
    )  # fmt: skip
    assert [(spec.name, spec.shape) for spec in made.inputs] == [
        ("pixels", ["batch", 3, "height", 8]), ("offset", ["batch", 2]),
    ]  # fmt: skip
    assert [spec.name for spec in made.outputs] == ["scores", "states"] and made.task == "module"
    image, offset = torch.randn(5, 3, 11, 8), torch.randn(5, 2)
    with torch.no_grad():
        expected = module(image, offset)
    with GraphProcess(tmp_path / "out" / "model.onnx", threads=1) as process:
        found = process.run({"pixels": image.numpy(), "offset": offset.numpy()})
    np.testing.assert_allclose(found["scores"], expected[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(found["states"], expected[1].numpy(), atol=1e-5)


class Branching(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > 0 else x


@pytest.mark.parametrize(
    ("module", "inputs", "message"),
    [
        (Two(), (torch.zeros(1, 3, 8, 8), torch.zeros(1, 2)), "training mode"),
        (Branching().eval(), (torch.zeros(2, 2),), "torch cannot trace Outputs"),
        (Two().eval(), {"image": 3, "offset": 4}, "not all tensors"),
        ("model", (torch.zeros(1),), "is not a torch.nn.Module"),
    ],
    ids=["training", "untraceable", "no tensors", "no module"],
)
def test_a_module_that_cannot_be_exported_is_refused(tmp_path: Path, module: Any, inputs: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        export_module(module, inputs, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def changed(checkpoint: Path, folder: Path, tensor: str, value: float | None) -> Path:
    """A copy whose tensor holds `value` in one place, or lacks the tensor."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    if value is None:
        del weights[tensor]
    else:
        weights[tensor].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "classifier.weight holds 1 values that are NaN"), (None, "no weights for text-classification")],
)
def test_weights_that_are_not_there_or_not_finite_are_refused(
    tmp_path: Path, bert: Path, value: float | None, message: str
) -> None:
    broken = changed(bert, tmp_path / "model", "classifier.weight", value)
    with pytest.raises(UserError, match=message):
        export(broken, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_checkpoint_does_is_told_from_its_config_or_asked_for(tmp_path: Path, bert: Path) -> None:
    assert task_of(bert) == "text-classification"
    with pytest.raises(UserError, match="no task 'classify'") as caught:
        task_of(bert, "classify")
    assert all(name in caught.value.remedy for name in TASKS)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertForNothing"]}))
    with pytest.raises(UserError, match="BertForNothing") as caught:
        task_of(folder)
    assert all(name in caught.value.remedy for name in TASKS)
    for name, task in {
        "BertForMaskedLM": "fill-mask", "MarianMTModel": "text2text", "MarianModel": "feature-extraction",
        "LlamaForCausalLM": "causal-lm", "GPT2LMHeadModel": "causal-lm", "ViTForImageClassification":
        "image-classification", "BartForConditionalGeneration": "text2text",
    }.items():  # fmt: skip
        (folder / "config.json").write_text(json.dumps({"architectures": [name]}))
        assert task_of(folder) == task


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path, bert: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    word_piece(folder, vocab_size=260)
    config = json.loads((folder / "tokenizer.json").read_text())
    config["added_tokens"].append({**config["added_tokens"][-1], "id": 400, "content": "[NEW]"})
    (folder / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the embedding 200 rows"):
        export(folder, tmp_path / "out")


def test_wrong_quantization_and_opset_are_refused(tmp_path: Path, bert: Path) -> None:
    with pytest.raises(UserError, match="no ONNX quantization 'FP8'"):
        export_encoder(bert, tmp_path / "out", quantization="FP8")
    with pytest.raises(UserError, match="opset 3"):
        export(bert, tmp_path / "out", opset=3)
    assert list(tmp_path.iterdir()) == []


def test_the_command_exports_an_encoder(tmp_path: Path, bert: Path) -> None:
    made = stages.export(
        str(bert), format_="onnx", quantization="FP32", context_tokens=None, out=tmp_path / "out",
        store=Store(tmp_path / "store"), task="text-classification",
    )  # fmt: skip
    record = Artifact.model_validate_json((tmp_path / "out" / "artifact.json").read_text())
    assert record == made and made.runtime == "onnxruntime" and made.parity is not None
    assert stages.open_artifact(tmp_path / "out").result == made
    entry = next(file for file in made.files if file.path == "model.onnx")
    assert hashlib.sha256((tmp_path / "out" / "model.onnx").read_bytes()).hexdigest() == entry.sha256
