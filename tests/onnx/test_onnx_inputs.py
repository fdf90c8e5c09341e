"""What a graph takes and what it is compared on: every input of the model, the files that ship, the longest text."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from encoders import BERT, VOCABULARY, tiny_encoder, word_piece
from PIL import Image

from edgedistill.errors import UserError
from edgedistill.export.stage import write_artifact
from edgedistill.models.companions import PROCESSOR_NAMES, SETTINGS_NAMES, TOKENIZER_NAMES
from edgedistill.onnx import inputs
from edgedistill.onnx.float_export import module_graph, trace
from edgedistill.onnx.inputs import longest_compared
from edgedistill.onnx.model_inputs import text_inputs
from edgedistill.onnx.parity import _of_one, check_parity
from edgedistill.onnx.processors import given_names, open_tokenizer, read, require_same_tokens, ship
from edgedistill.onnx.tasks import open_task
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.artifact import Artifact, TensorSpec
from edgedistill.runtimes.graph import GraphProcess

TEXT = ["input_ids", "attention_mask"]
TYPED = [*TEXT, "token_type_ids"]
XLNET: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 64}


def export(checkpoint: Path, out: Path, quantization: str = "FP32", **options: Any) -> Artifact:
    return write_artifact(
        checkpoint, out, format_="onnx", quantization=quantization, context_tokens=0, name="x",
        options=ExportOptions(**options),
    )  # fmt: skip


def tiny(family: str, head: str, **sizes: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**sizes)
    return getattr(transformers, f"{family}{head}")(config).eval()


@pytest.mark.parametrize(
    ("family", "sizes", "given", "names"),
    [
        ("Bert", BERT, TYPED, TYPED),
        ("Bert", BERT, TEXT, TEXT),  # XLM-R's tokenizer, as E5 has it: the model takes zeros
        ("Bert", BERT, None, TYPED),
        ("Roberta", {**BERT, "type_vocab_size": 1}, TYPED, TEXT),
        ("XLNet", XLNET, TYPED, TYPED),
        ("Ernie", BERT, TYPED, TYPED),  # its task ids are read only where the config says so
        ("XLM", {"vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 1, "n_heads": 2}, TEXT, TEXT),
    ],
)
def test_a_graph_takes_what_the_tokenizer_gives_and_the_model_reads(
    family: str, sizes: dict[str, Any], given: list[str] | None, names: list[str]
) -> None:
    head = "ForSequenceClassification"
    assert sorted(text_inputs(tiny(family, head, **sizes), given, "model")) == sorted(names)


@pytest.mark.parametrize(
    ("family", "head", "sizes", "message"),
    [
        ("LayoutLM", "ForTokenClassification", BERT, "takes bbox beside text"),
        ("Longformer", "ForSequenceClassification", {**BERT, "attention_window": [4, 4]}, "global_attention_mask"),
        ("Ernie", "ForSequenceClassification", {**BERT, "use_task_id": True}, "task_type_ids"),
        ("Luke", "Model", {**BERT, "entity_vocab_size": 4, "entity_emb_size": 8}, "entity_attention_mask, entity_ids"),
        ("MarkupLM", "ForTokenClassification", BERT, "xpath_subs_seq, xpath_tags_seq"),
        ("CLIP", "Model", {}, "takes pixel_values beside text.*CLIPModel"),
    ],
)
def test_an_input_that_nothing_gives_is_refused_by_name(
    family: str, head: str, sizes: dict[str, Any], message: str
) -> None:
    if family == "CLIP":
        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        sizes = {"text_config": small, "vision_config": {**small, "image_size": 16, "patch_size": 8}}
    with pytest.raises(UserError, match=message):
        text_inputs(tiny(family, head, **sizes), TYPED, "model")


def test_positions_without_end_and_blocks_promise_what_is_right(tmp_path: Path) -> None:
    """XLNet's config says -1; BigBird attends to everything up to 7 blocks only, and never again after a short text."""
    for family, sizes in (("XLNet", XLNET), ("BigBird", {**BERT, "block_size": 16, "num_random_blocks": 1})):
        folder = tmp_path / family
        sizes = sizes if family == "XLNet" else {**sizes, "max_position_embeddings": 512}
        tiny(family, "ForSequenceClassification", **sizes).save_pretrained(folder)
        word_piece(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": int(1e30)}))
    assert open_task(tmp_path / "XLNet").max_tokens == 512
    assert open_task(tmp_path / "BigBird").max_tokens == 7 * 16


def test_what_does_not_run_or_gives_something_else_is_refused(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "t5", "t5")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["T5Model"]}))
    with pytest.raises(UserError, match="a T5Model does not run on input_ids"):
        open_task(folder)
    folder = tmp_path / "dpr"  # which pools, and gives nothing by token
    transformers.DPRQuestionEncoder(transformers.DPRConfig(**BERT)).save_pretrained(folder)
    word_piece(folder)
    with pytest.raises(UserError, match="a DPRQuestionEncoder gives no last_hidden_state"):
        open_task(folder, "feature-extraction")


# Images


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its config says nothing of a size, its processor 32: transformers would take 224."""
    folder = tiny_encoder(tmp_path_factory.mktemp("resnet") / "model", "resnet")
    transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(folder)
    return folder


def test_an_image_has_the_size_that_its_processor_gives(resnet: Path, tmp_path: Path) -> None:
    made = export(resnet, tmp_path / "out")
    assert made.inputs[0].shape == ["batch", 3, 32, 32]
    image = Image.fromarray((np.random.default_rng(0).random((70, 50, 3)) * 255).astype(np.uint8))
    before = transformers.AutoImageProcessor.from_pretrained(resnet)(image, return_tensors="pt")
    with torch.no_grad():
        expected = transformers.AutoModelForImageClassification.from_pretrained(resnet)(**before).logits
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")(image, return_tensors="np")
    with GraphProcess(tmp_path / "out" / "model.onnx", threads=1) as process:
        found = process.run({"pixel_values": np.asarray(pixels["pixel_values"])})["logits"]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_images_of_several_sizes_have_axes_that_vary(resnet: Path) -> None:
    processor = transformers.ViTImageProcessor(do_resize=False)
    folder = resnet.parent / "several"
    transformers.AutoModelForImageClassification.from_pretrained(resnet).save_pretrained(folder)
    processor.save_pretrained(folder)
    graph = open_task(folder).graphs[0]
    assert graph.axes["pixel_values"] == {0: "batch", 2: "height", 3: "width"}
    assert graph.examples["pixel_values"].shape[2] != graph.examples["pixel_values"].shape[3]


def test_a_model_of_gray_images_gets_gray_ones(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "model", "vit", head={"num_channels": 1})
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5]).save_pretrained(
        folder
    )
    assert open_task(folder).graphs[0].examples["pixel_values"].shape == (2, 1, 16, 16)
    spec = TensorSpec(name="pixel_values", dtype="float", shape=["batch", 1, 16, 16])
    assert [batch["pixel_values"].shape[:2] for batch in inputs.image_batches(folder, [spec])] == [(1, 1), (3, 1)]


def test_a_processor_of_another_size_than_the_models_is_refused(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "model", "vit")
    transformers.ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(folder)
    with pytest.raises(UserError, match=r"does not run on pixel_values \[2, 3, 24, 24\].*16"):
        open_task(folder)


# Files


def test_every_file_that_a_tokenizer_or_processor_loads_from_ships_and_nothing_else(tmp_path: Path) -> None:
    folder, built = tmp_path / "model", tmp_path / "built"
    folder.mkdir()
    built.mkdir()
    names = {*TOKENIZER_NAMES, *PROCESSOR_NAMES, *SETTINGS_NAMES, "vocabulary.of.its.own"}
    for name in {*names, "model.safetensors", "trainer_state.json", "README.md", "optimizer.pt", ".hidden.json"}:
        (folder / name).write_text("{}")
    own = type("Tokenizer", (), {"vocab_files_names": {"vocab_file": "vocabulary.of.its.own"}, "model_max_length": 64})
    ship([folder], built, tokenizer=own(), max_tokens=64)
    assert {path.name for path in built.iterdir()} == names
    # Marian's, ProphetNet's, XLM's and CLIP's among them
    assert {"source.spm", "target.spm", "vocab.json", "prophetnet.tokenizer", "merges.txt"} <= names


def test_a_name_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "built").mkdir()
    os.mkfifo(tmp_path / "spiece.model")
    ship([tmp_path], tmp_path / "built", tokenizer=None, max_tokens=0)
    assert list((tmp_path / "built").iterdir()) == []


def test_the_tokenizer_that_ships_cuts_where_the_promise_ends_and_reads_as_the_models(tmp_path: Path) -> None:
    folder, built = tmp_path / "model", tmp_path / "built"
    folder.mkdir()
    built.mkdir()
    word_piece(folder)
    original = open_tokenizer(folder)
    ship([folder], built, tokenizer=original, max_tokens=20)
    shipped = open_tokenizer(built)
    assert shipped is not None and len(shipped("a fox " * 50, truncation=True)["input_ids"]) == 20
    require_same_tokens(original, shipped, ["A fox jumps", ""], folder)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace('"fox"', '"fax"'))
    with pytest.raises(UserError, match="the tokenizer that ships reads"):
        require_same_tokens(open_tokenizer(folder), shipped, ["A fox jumps"], folder)
    with pytest.raises(UserError, match="cannot be opened from what ships"):
        require_same_tokens(original, open_tokenizer(tmp_path), ["A fox"], folder)


def test_a_tokenizer_that_takes_no_text_is_refused(tmp_path: Path) -> None:
    def tables_alone(*_texts: Any, **_options: Any) -> None:
        raise AssertionError("Table must be of type pd.DataFrame")

    with pytest.raises(UserError, match="its tokenizer cannot be used: Table must be"):
        read(tables_alone, "text", where=tmp_path)
    tables_alone.model_input_names = ["input_ids", "bbox"]  # type: ignore[attr-defined]
    assert given_names(tables_alone, tmp_path) == ["input_ids", "bbox"]


# Lengths


class Window(torch.nn.Module):
    """Sums of a text, which beyond `most` tokens count double."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 4))
        self.most = most

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        found = (input_ids.unsqueeze(-1).float() / 10 @ self.weight[:1]).sum(1)
        return found * 2 if input_ids.shape[1] > self.most else found


def test_a_graph_that_is_wrong_beyond_a_window_is_refused_with_the_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 9, (2, 6))
    graph = module_graph(Window(10**6).eval(), {"input_ids": ids}, dynamic={"input_ids": {0: "batch", 1: "sequence"}})
    traced = trace(graph, graph.module, tmp_path, opset=None, parameters=32)
    rng = np.random.default_rng(0)
    usual = [{"input_ids": rng.integers(0, 9, (4, 12))}]
    lengths = [{"input_ids": rng.integers(0, 9, (1, tokens))} for tokens in (1, 30, 60)]

    def check(module: Any) -> None:
        held = dataclasses.replace(traced, module=module)
        check_parity(held, tmp_path / "model.onnx", usual, lengths=lengths, quantization="FP32", inputs="numbers")

    check(graph.module)
    model = graph.module.model
    model.most = 40
    with pytest.raises(UserError, match=r"for 60 tokens.*For 30 it does") as caught:
        check(graph.module)
    assert "--context-tokens 30" in caught.value.remedy
    # One text may be rounded more than the mean of several, and still not be another.
    assert _of_one("FP32", 1e-4) == 1e-4 and _of_one("INT8-WEIGHTS", 0.2) == 0.4 and _of_one("INT4", 0.8) == 0.9


def test_the_longest_text_that_is_promised_is_compared_or_less_is_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    model = tiny("Bert", "ForMaskedLM", **{**BERT, "max_position_embeddings": 4096})
    model.save_pretrained(folder)
    opened = open_task(folder)
    monkeypatch.setattr(inputs.facts, "available_bytes", lambda: 1 << 40)
    assert longest_compared(opened, None) == (4096, []) and longest_compared(opened, 300) == (300, [])
    monkeypatch.setattr(inputs.facts, "available_bytes", lambda: 200 << 20)
    longest, notes = longest_compared(opened, None)
    assert longest < 4096 and "4,096" in notes[0] and f"{longest:,}" in notes[0]
