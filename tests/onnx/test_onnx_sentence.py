"""Embeddings of sentence-transformers folders: all that stands behind the transformer, however it is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import tiny_encoder
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

from edgedistill.errors import UserError
from edgedistill.export.stage import write_artifact
from edgedistill.onnx.sentence import activation_of, model_type, pooling_modes, read_pipeline
from edgedistill.onnx.sentence_modules import Pooling, Sentence
from edgedistill.onnx.tasks import open_task, task_of
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.artifact import Artifact
from edgedistill.runtimes.graph import GraphProcess

OLD = "sentence_transformers.models."
NEW = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}
TEXTS = ("No.", "the fox jumps over the lazy dog and a girl looks on", "a fox " * 90)


def export(checkpoint: Path, out: Path, quantization: str = "FP32", **options: Any) -> Artifact:
    return write_artifact(
        checkpoint, out, format_="onnx", quantization=quantization, context_tokens=0, name="x",
        options=ExportOptions(**options),
    )  # fmt: skip


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def modules(folder: Path, *kinds: str, new: bool = False, transformer: str = "") -> None:
    """modules.json with folders as git keeps them: those that hold a file."""
    rows = [{"idx": 0, "name": "0", "path": transformer, "type": NEW["Transformer"] if new else OLD + "Transformer"}]
    rows += [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}", "type": NEW[kind] if new else OLD + kind}
        for i, kind in enumerate(kinds, 1)
    ]
    write(folder / "modules.json", rows)


def dense(folder: Path, name: str, activation: str = "Tanh") -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A Dense layer of 32 → 16; its weights."""
    write(
        folder / name / "config.json",
        {"in_features": 32, "out_features": 16, "bias": True,
         "activation_function": f"torch.nn.modules.activation.{activation}"},
    )  # fmt: skip
    torch.manual_seed(3)
    weights = {"linear.weight": torch.randn(16, 32), "linear.bias": torch.randn(16)}
    save_file(weights, folder / name / "model.safetensors")
    return weights["linear.weight"].numpy(), weights["linear.bias"].numpy()


def states(folder: Path, text: str, longest: int) -> NDArray[np.float64]:
    """[T, D] token vectors of transformers itself, of the text cut to `longest` tokens."""
    tokens = AutoTokenizer.from_pretrained(folder)(text, truncation=True, max_length=longest, return_tensors="pt")
    with torch.no_grad():
        found = AutoModel.from_pretrained(folder)(**tokens).last_hidden_state[0]
    return found.double().numpy()


def embedded(out: Path, texts: tuple[str, ...]) -> NDArray[np.float32]:
    """What the exported folder alone gives for texts in one batch."""
    tokens = AutoTokenizer.from_pretrained(out)(list(texts), padding=True, truncation=True, return_tensors="np")
    with GraphProcess(out / "model.onnx", threads=1) as process:
        return process.run({name: np.asarray(value) for name, value in tokens.items()})["sentence_embedding"]


def test_every_module_is_in_the_graph_and_texts_are_cut_where_the_folder_says(tmp_path: Path) -> None:
    """Old form: the transformer in a folder of its own, Normalize without any, a tokenizer without token types."""
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    inner = tiny_encoder(checkpoint / "0_Transformer", "bert-model")
    config = json.loads((inner / "tokenizer_config.json").read_text())
    write(inner / "tokenizer_config.json", {**config, "model_input_names": ["input_ids", "attention_mask"]})
    write(inner / "sentence_bert_config.json", {"max_seq_length": 24, "do_lower_case": False})
    modules(checkpoint, "Pooling", "Dense", "Normalize", transformer="0_Transformer")
    write(checkpoint / "1_Pooling" / "config.json", {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True})
    weight, bias = dense(checkpoint, "2_Dense")
    write(
        checkpoint / "config_sentence_transformers.json",
        {"prompts": {"query": "query: "}, "default_prompt_name": "query"},
    )
    made = export(checkpoint, tmp_path / "out")
    assert made.task == "embedding" and made.context_tokens == 24
    assert [spec.name for spec in made.inputs] == ["input_ids", "attention_mask"]
    assert any("'query: '" in note for note in made.notes)
    expected = []
    for text in TEXTS:
        vector = np.tanh(states(inner, text, 24).mean(0) @ weight.T.astype(np.float64) + bias)
        expected.append(vector / np.linalg.norm(vector))
    np.testing.assert_allclose(embedded(tmp_path / "out", TEXTS), expected, atol=1e-5)
    assert made.parity is not None and "24 tokens" in made.parity.inputs


MODES = {
    "cls": lambda found: found[0],
    "max": lambda found: found.max(0),
    "mean": lambda found: found.mean(0),
    "mean_sqrt_len_tokens": lambda found: found.sum(0) / len(found) ** 0.5,
    "weightedmean": lambda found: np.average(found, axis=0, weights=np.arange(1, len(found) + 1)),
    "lasttoken": lambda found: found[-1],
}


@pytest.mark.parametrize("left", [False, True])
def test_each_pooling_looks_at_what_is_no_padding(left: bool) -> None:
    rng = np.random.default_rng(0)
    lengths, longest = (3, 7, 1), 7
    states_BTD = rng.standard_normal((3, longest, 5))
    mask_BT = np.zeros((3, longest), dtype=np.int64)
    for row, length in enumerate(lengths):
        mask_BT[row, longest - length if left else 0 : longest if left else length] = 1
    for mode, expected in MODES.items():
        pooled = Pooling((mode,), left_padded=left)(torch.tensor(states_BTD), torch.tensor(mask_BT)).numpy()
        for row in range(3):
            np.testing.assert_allclose(pooled[row], expected(states_BTD[row][mask_BT[row] > 0]), err_msg=mode)
    both = Pooling(("cls", "mean"), left_padded=left)(torch.tensor(states_BTD), torch.tensor(mask_BT))
    assert both.shape == (3, 10)


@pytest.mark.parametrize(
    ("settings", "modes"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, ("max", "mean")),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 8, "include_prompt": True}, ("lasttoken",)),
        ({"pooling_mode": ["cls", "mean"]}, ("cls", "mean")),
        ({"word_embedding_dimension": 8}, ("mean",)),
    ],
)
def test_pooling_is_read_in_its_old_and_its_new_form(settings: dict[str, Any], modes: tuple[str, ...]) -> None:
    assert pooling_modes(settings) == modes


def test_the_new_form_is_read_as_the_old_one(tmp_path: Path) -> None:
    checkpoint = tiny_encoder(tmp_path / "model", "bert-model")
    modules(checkpoint, "Pooling", "Normalize", new=True)
    write(checkpoint / "1_Pooling" / "config.json", {"pooling_mode": "cls", "include_prompt": True})
    write(checkpoint / "2_Normalize" / "config.json", {"module_input_name": "sentence_embedding"})
    write(
        checkpoint / "config_sentence_transformers.json",
        {"model_type": "SentenceTransformer", "prompts": {"query": "", "document": ""}, "truncate_dim": 8},
    )
    opened = open_task(checkpoint)
    module = opened.graphs[0].module
    assert opened.task == "embedding" and opened.notes == () and isinstance(module, Sentence)
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.no_grad():
        made = module(input_ids=ids, attention_mask=torch.ones_like(ids))["sentence_embedding"]
        first = opened.model(input_ids=ids).last_hidden_state[:, 0]
    np.testing.assert_allclose(made, torch.nn.functional.normalize(first, dim=-1)[:, :8], atol=1e-6)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("plain") / "model", "bert-model")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules.json": [{"type": OLD + "Transformer"}, {"type": OLD + "WeightedLayerPooling"}]},
         "a WeightedLayerPooling module"),
        ({"modules.json": [{"type": OLD + "BoW"}, {"type": OLD + "Pooling"}]}, "begins with BoW"),
        ({"modules.json": [{"type": "custom_st.Transformer"}]}, "code of its own"),
        ({"modules.json": [{"type": OLD + "Transformer"}, {"type": OLD + "Pooling", "path": "../.."}]}, "out of the"),
        ({"modules.json": [{"type": OLD + "Transformer"}, {"type": OLD + "Normalize"}]}, "has no Pooling"),
        ({"1_Pooling/config.json": {"pooling_mode_median_tokens": True}}, "pooling_mode_median_tokens"),
        ({"1_Pooling/config.json": {"pooling_mode": "middle"}}, "the pooling is middle"),
        ({"1_Pooling/config.json": {"include_prompt": False},
          "config_sentence_transformers.json": {"prompts": {"query": "q: "}}}, "include_prompt"),
        ({"1_Pooling/config.json": {}, "sentence_bert_config.json": {"do_lower_case": True}}, "do_lower_case"),
        ({"1_Pooling/config.json": {}, "sentence_bert_config.json": {"config_args": {"num_hidden_layers": 1}}},
         "config_args"),
        ({"modules.json": [{"type": OLD + k, "path": f"{k}"} for k in ("Transformer", "Pooling", "Dense")],
          "Dense/config.json": {"in_features": 32, "out_features": 4}}, "model.safetensors"),
        ({"config_sentence_transformers.json": {"model_type": "SparseEncoder"}}, "is sentence-transformers' Sparse"),
    ],
)  # fmt: skip
def test_what_a_graph_would_lack_is_refused_by_name(
    plain: Path, tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    checkpoint = tmp_path / "model"
    shutil.copytree(plain, checkpoint)
    if "Transformer" in json.dumps(files.get("modules.json", "")) and "Dense/config.json" in files:
        shutil.copytree(plain, checkpoint / "Transformer")
    for name, value in files.items():
        write(checkpoint / name, value)
    if "do_lower_case" in message:
        tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
        tokenizer["normalizer"] = None
        tokenizer["model"]["vocab"] |= {"ABC": 1, "abc": 2}
        write(checkpoint / "tokenizer.json", tokenizer)
    with pytest.raises(UserError, match=message):
        open_task(checkpoint)


def test_a_reranker_gives_its_logits_and_what_sentence_transformers_makes_of_them(tmp_path: Path) -> None:
    checkpoint = tiny_encoder(tmp_path / "model", "bert")
    config = json.loads((checkpoint / "config.json").read_text())
    assert model_type(checkpoint) is None and activation_of(checkpoint, config, 1) is None
    modules(checkpoint, new=True)
    write(checkpoint / "sentence_bert_config.json", {"transformer_task": "sequence-classification"})
    assert model_type(checkpoint) == "CrossEncoder" and task_of(checkpoint) == "text-classification"
    assert activation_of(checkpoint, config, 1) == "torch.nn.modules.activation.Sigmoid"
    assert activation_of(checkpoint, config, 3) == "torch.nn.modules.linear.Identity"
    config["sentence_transformers"] = {"activation_fn": "torch.nn.modules.activation.Tanh", "version": "4.0.0"}
    write(checkpoint / "config.json", config)
    made = export(checkpoint, tmp_path / "out")
    assert [spec.name for spec in made.outputs] == ["logits", "scores"]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("a fox", "the dog", return_tensors="np")
    with GraphProcess(tmp_path / "out" / "model.onnx", threads=1) as process:
        found = process.run({name: np.asarray(value) for name, value in tokens.items()})
    np.testing.assert_allclose(found["scores"], np.tanh(found["logits"]), atol=1e-6)
    assert made.parity is not None and "pairs" in made.parity.inputs


def test_a_reranker_that_reads_a_decoders_logits_is_no_decoder_alone(tmp_path: Path) -> None:
    write(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    write(tmp_path / "modules.json", [{"type": NEW["Transformer"], "path": ""}])
    write(tmp_path / "sentence_bert_config.json", {"transformer_task": "text-generation"})
    with pytest.raises(UserError, match="reads a decoder's logits"):
        task_of(tmp_path)
    assert task_of(tmp_path, "causal-lm") == "causal-lm"


def test_a_pipeline_without_any_file_is_the_mean(plain: Path) -> None:
    found = read_pipeline(plain)
    assert [step.kind for step in found.steps] == ["Pooling"] and found.max_tokens is None
