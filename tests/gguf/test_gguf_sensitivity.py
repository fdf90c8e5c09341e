"""Mixes of GGUF types on a trained model: the file holds what was measured, keeps what was asked, and is no larger."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import copy, mean_nll, tiny, torch_logits, torch_model, with_weights
from family_models import family

from edgedistill.errors import UserError
from edgedistill.export.stage import write_artifact
from edgedistill.gguf.dequantize import dequantized
from edgedistill.gguf.quantize import export_gguf
from edgedistill.gguf.request import request_of, with_importance
from edgedistill.gguf.sensitivity import Scored, StoredModel, group_of, ladders_of, read_text
from edgedistill.models.architectures import Model, model_of
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.artifact import Artifact, Sensitivity
from edgedistill.strict import read_json

CONTEXT = 128


@pytest.fixture(scope="module")
def stories(test_data: Path) -> Path:
    return test_data / "weights" / "stories260k-hf"


@pytest.fixture(scope="module")
def options(test_data: Path) -> ExportOptions:
    """48 documents of some 100 tokens, more than are measured on."""
    text = (test_data / "text_lm" / "tinystories" / "tinystories_calib.txt").read_text(encoding="utf-8")
    documents = [text[start : start + 300] for start in range(0, 48 * 300, 300)]
    return ExportOptions(
        calibration=tuple((document,) for document in documents), calibration_source="stories", calibration_samples=24,
        calibration_tokens=CONTEXT, importance_matrix="off",
    )  # fmt: skip


def asking(options: ExportOptions, retention: float | None, **changes: Any) -> ExportOptions:
    return dataclasses.replace(options, mixed_retention=retention, **changes)


def export(checkpoint: Path, out: Path, options: ExportOptions, quantization: str = "Q4_0") -> Artifact:
    return export_gguf(
        checkpoint, out, quantization=quantization, context_tokens=256, threads=2, name="test", options=options
    )


def searched(artifact: Artifact) -> Sensitivity:
    assert artifact.sensitivity is not None
    return artifact.sensitivity


def model_at(checkpoint: Path) -> Model:
    return model_of(read_json(checkpoint / "config.json", what=""), where="")


def slow_retention(checkpoint: Path, model: Any, options: ExportOptions) -> float:
    """A window at a time, in float64: the smaller of exp(-rise of the mean loss) and exp(-mean KL)."""
    text = read_text(checkpoint, model_at(checkpoint), options, weighted=False)
    original = torch_model(checkpoint)
    kl, rise, tokens = 0.0, 0.0, 0
    for window in (window for batch in text.batches for window in batch):
        assert window.first == 0
        ids = window.ids.astype(np.int64)
        expected, found = torch_logits(original, ids), torch_logits(model, ids)
        log_p, log_q = (torch.from_numpy(x[:-1]).double().log_softmax(-1) for x in (expected, found))
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        rise += (mean_nll(found, ids) - mean_nll(expected, ids)) * (len(ids) - 1)
        tokens += len(ids) - 1
    assert tokens == text.tokens
    return math.exp(-max(kl, rise) / tokens)


@pytest.fixture(scope="module")
def bounds(stories: Path, options: ExportOptions, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Q4_0 as it is and with everything at Q8_0: bytes, and what they keep."""
    found: dict[str, Any] = {}
    for quantization in ("Q4_0", "Q8_0"):
        folder = tmp_path_factory.mktemp(quantization)
        artifact = export(stories, folder, options, quantization)
        model = with_weights(stories, dict(dequantized(folder / artifact.entry)))
        found[quantization] = (artifact.bytes, slow_retention(stories, model, options))
    return found


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_the_file_holds_what_was_measured_and_keeps_what_was_asked(
    share: float, stories: Path, options: ExportOptions, bounds: dict[str, Any], tmp_path: Path
) -> None:
    """Between Q4_0 and Q8_0 in both size and retention; a slow computation from the file's bytes gives `reached`."""
    (low_bytes, low), (high_bytes, high) = bounds["Q4_0"], bounds["Q8_0"]
    target = low + share * (high - low)
    artifact = export(stories, tmp_path / "out", asking(options, target))
    record = searched(artifact)
    model = with_weights(stories, dict(dequantized(tmp_path / "out" / artifact.entry)))
    assert record.reached == pytest.approx(slow_retention(stories, model, options), abs=2e-6)
    assert record.as_quantized == pytest.approx(low, abs=2e-6)
    assert record.reached >= target == record.target
    assert low_bytes < artifact.bytes < high_bytes
    assert artifact.bytes == pytest.approx(low_bytes + record.bytes_added, abs=64)
    raised = {row.group for row in record.rows if row.chosen != row.type}
    assert raised == {group_of(name) for name in artifact.overrides}
    assert set(artifact.overrides.values()) <= {"Q5_0", "Q8_0"}
    assert (record.examples, record.source) == (read_text(stories, model_at(stories), options, weighted=False).tokens,
                                                "stories")  # fmt: skip


def test_the_table_has_every_group_and_its_figures_are_those_of_the_group_alone(
    stories: Path, options: ExportOptions, bounds: dict[str, Any], tmp_path: Path
) -> None:
    record = searched(export(stories, tmp_path, asking(options, bounds["Q4_0"][1] - 1e-5)))
    layers = [f"layer {layer} {part}" for layer in range(5) for part in ("attention", "feed-forward")]
    assert {row.group for row in record.rows} == {*layers, "embedding"}
    assert all(row.chosen == row.type for row in record.rows) and record.bytes_added == 0
    for row in record.rows:
        assert 0 < row.cost_ci95[0] < row.cost < row.cost_ci95[1]
    attention = next(row for row in record.rows if row.group == "layer 3 attention")
    weights = 2 * 64 * 64 + 2 * 64 * 32
    assert (attention.type, attention.bytes_saved) == ("Q4_0", weights * 2 - weights // 32 * 18)
    stored = {f"model.layers.3.self_attn.{part}_proj.weight": None for part in "qkvo"}
    one = {name: values for name, values in dequantized(tmp_path / "model.gguf") if name in stored}
    model = torch_model(stories)
    model.load_state_dict({name: torch.from_numpy(np.array(v)) for name, v in one.items()}, strict=False)
    # The loss may fall by chance; KL cannot
    assert slow_retention(stories, model, options) <= math.exp(-attention.cost) * (1 + 1e-6)


def outlying(source: Path, folder: Path, layer: int) -> Path:
    """The same function with one layer's attention hard to quantize: a value channel a hundred times smaller, the
    output's column as much larger, so that it spoils the blocks of its rows.
    """
    from safetensors.torch import load_file, save_file

    path = copy(source, folder) / "model.safetensors"
    tensors = load_file(path)
    prefix = f"model.layers.{layer}.self_attn."
    for key_head in range(4):
        tensors[f"{prefix}v_proj.weight"][key_head * 8] /= 100
        for head in (2 * key_head, 2 * key_head + 1):
            tensors[f"{prefix}o_proj.weight"][:, head * 8] *= 100
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("layer", [1, 4])
def test_a_layer_of_outliers_ranks_first_and_is_raised(
    layer: int, stories: Path, options: ExportOptions, tmp_path: Path
) -> None:
    checkpoint = outlying(stories, tmp_path / "model", layer)
    tokens = np.arange(3, 100)
    assert np.allclose(
        torch_logits(torch_model(checkpoint), tokens), torch_logits(torch_model(stories), tokens), atol=1e-3
    )
    plain = export(stories, tmp_path / "plain", asking(options, 0.5))
    before = {row.group: row.cost for row in searched(plain).rows}
    target = searched(plain).as_quantized
    record = searched(export(checkpoint, tmp_path / "out", asking(options, target)))
    first = record.rows[0]
    assert first.group == f"layer {layer} attention" and first.chosen != first.type
    assert first.cost > 5 * before[first.group]
    assert record.as_quantized < target <= record.reached


def test_more_is_never_smaller(stories: Path, options: ExportOptions, bounds: dict[str, Any], tmp_path: Path) -> None:
    low, high = bounds["Q4_0"][1], bounds["Q8_0"][1]
    sizes = [
        export(stories, tmp_path / str(share), asking(options, low + share * (high - low))).bytes
        for share in (0.0, 0.5, 0.95)
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[1] < sizes[2]


def test_the_same_search_gives_the_same_bytes(
    stories: Path, options: ExportOptions, bounds: dict[str, Any], tmp_path: Path
) -> None:
    asked = asking(options, (bounds["Q4_0"][1] + bounds["Q8_0"][1]) / 2)
    one, two = (export(stories, tmp_path / name, asked) for name in ("a", "b"))
    assert one.sha256 == two.sha256 and one.sensitivity == two.sensitivity


def test_k_quants_with_an_importance_matrix(options: ExportOptions, tmp_path: Path) -> None:
    """Widths of 256: the types are those of the mix and above, the matrix weights them all, llama.cpp runs the file."""
    checkpoint = tiny(tmp_path / "model", hidden_size=256, intermediate_size=256, head_dim=64)
    asked = dataclasses.replace(options, importance_matrix="auto", calibration_samples=17, compare_speed=False)
    settings: dict[str, Any] = {"format_": "gguf", "quantization": "Q3_K_S", "context_tokens": 256, "name": "test"}
    plain = write_artifact(checkpoint, tmp_path / "plain", options=asking(asked, 0.01), **settings)
    low = searched(plain).as_quantized
    target = low + 0.7 * (1 - low)
    artifact = write_artifact(checkpoint, tmp_path / "out", options=asking(asked, target), **settings)
    record = searched(artifact)
    assert artifact.calibration is not None and artifact.parity is not None
    assert record.as_quantized == low < target <= record.reached
    assert {row.type for row in record.rows} == {"Q3_K", "Q6_K"}
    model = with_weights(checkpoint, dict(dequantized(tmp_path / "out" / "model.gguf")))
    assert record.reached == pytest.approx(slow_retention(checkpoint, model, asked), abs=1e-5)


def test_stored_values_are_the_files_for_every_matrix(tmp_path: Path, options: ExportOptions) -> None:
    """GPT-2: transposed matrices and fused q, k, v, at odd steps of their ladders."""
    checkpoint = family(tmp_path / "model", "gpt2", {"hidden_size": 256, "tie_word_embeddings": True})
    asked = dataclasses.replace(options, importance_matrix="on")
    model = model_at(checkpoint)
    request = with_importance(request_of(checkpoint, model, "Q3_K_M", asked), checkpoint, model)
    stored = StoredModel(checkpoint, model, request)
    ladders = ladders_of(model, request, stored)
    chosen = {
        name: type_ for i, (group, steps) in enumerate(ladders.values()) for name, type_ in steps[i % len(group.types)]
    }
    types = tuple((f"^{name}$", type_) for name, type_ in chosen.items())
    export(checkpoint, tmp_path / "out", dataclasses.replace(asked, tensor_types=types), "Q3_K_M")
    by_torch = {name: spec.gguf_name for name, spec in model.specs.items()}
    held = 0
    for name, values in dequantized(tmp_path / "out" / "model.gguf"):
        if by_torch[name] in chosen:
            assert np.array_equal(stored.values(by_torch[name], chosen[by_torch[name]]), values), name
            held += 1
    assert held == len(chosen) == 2 * 4 + 1


def test_after_a_measurement_the_model_is_the_checkpoints(stories: Path, options: ExportOptions) -> None:
    model = model_at(stories)
    request = request_of(stories, model, "Q4_0", options)
    stored = StoredModel(stories, model, request)
    scored = Scored(stored, read_text(stories, model, options, weighted=False))
    assert scored.measure({}).cost.value == 0.0 and scored.measure({}).retention == 1.0
    found = scored.measure({"blk.0.attn_q.weight": "Q4_0"})
    assert found.cost.value > 0 and found.retention < 1
    expected = dict(torch_model(stories).named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in stored.model.named_parameters())
    # Without room for the float model's answers they are computed anew, and the figures are the same
    import edgedistill.gguf.sensitivity as module

    module_bytes, module.REFERENCE_BYTES = module.REFERENCE_BYTES, 0
    try:
        again = Scored(stored, scored.text).measure({"blk.0.attn_q.weight": "Q4_0"})
    finally:
        module.REFERENCE_BYTES = module_bytes
    assert again == found


def test_types_that_the_user_named_stay(
    stories: Path, options: ExportOptions, bounds: dict[str, Any], tmp_path: Path
) -> None:
    target = (bounds["Q4_0"][1] + bounds["Q8_0"][1]) / 2
    asked = asking(options, target, tensor_types=(("attn_q", "Q4_1"), (r"blk\.1\.ffn", "Q4_0")))
    artifact = export(stories, tmp_path, asked)
    assert {artifact.overrides[f"blk.{layer}.attn_q.weight"] for layer in range(5)} == {"Q4_1"}
    assert artifact.overrides["blk.1.ffn_up.weight"] == "Q4_0"
    (row,) = (row for row in searched(artifact).rows if row.group == "layer 1 feed-forward")
    assert row.type == row.chosen
    assert searched(artifact).reached >= target


def test_an_encoder_is_measured_by_its_vectors(tmp_path: Path, options: ExportOptions) -> None:
    checkpoint = family(tmp_path / "model", "bert", {"hidden_size": 64})
    asked = asking(options, 0.5)
    plain = searched(export(checkpoint, tmp_path / "plain", asked))
    assert plain.metric.startswith("1 - cosine") and 0.9 < plain.as_quantized < 1
    target = plain.as_quantized + 0.5 * (1 - plain.as_quantized)
    artifact = export(checkpoint, tmp_path / "out", dataclasses.replace(asked, mixed_retention=target))
    assert searched(artifact).reached >= target and searched(artifact).bytes_added > 0


@pytest.mark.parametrize(
    ("changes", "cause", "remedy"),
    [
        ({"mixed_retention": 1.0}, "with every layer at the highest type (F16, Q8_0)", "lower export.mixed_retention"),
        ({"calibration": None}, "needs text to measure the layers on", "--calibration"),
        ({"calibration": (("once upon a time",), ("there was",))}, "tokens of 2 documents", "--calibration"),
        ({"calibration": (("once upon a time " * 2000,),)}, "of 1 documents", "--calibration"),
        ({"converter": Path("convert_hf_to_gguf.py")}, "--converter writes tensors", "export.tensor_types"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    changes: dict[str, Any], cause: str, remedy: str, stories: Path, options: ExportOptions, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        export(stories, tmp_path / "out", dataclasses.replace(asking(options, 0.9), **changes))
    assert cause in refused.value.cause and remedy in refused.value.remedy
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("format_", ["onnx", "bitsandbytes", "executorch"])
def test_other_formats_are_refused(format_: str, stories: Path, options: ExportOptions, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only there are types chosen layer by layer"):
        write_artifact(
            stories, tmp_path / "out", format_=format_, quantization="INT8", context_tokens=256, name="test",
            options=asking(options, 0.9),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_file_in_floating_point_says_that_it_has_no_mix(
    stories: Path, options: ExportOptions, tmp_path: Path
) -> None:
    artifact = export(stories, tmp_path, asking(options, 0.9), "F16")
    assert artifact.sensitivity is None
    assert any("export.mixed_retention did nothing" in note for note in artifact.notes)


def test_text_is_taken_from_the_other_end_than_the_importance_matrix(
    stories: Path, options: ExportOptions, tmp_path: Path
) -> None:
    model = model_at(stories)
    half = read_text(stories, model, options, weighted=True)
    assert half.source == "stories" and 2048 <= half.tokens <= 24 * CONTEXT
    whole = read_text(stories, model, dataclasses.replace(options, calibration_samples=1000), weighted=True)
    assert whole.documents == 48 and whole.source == "stories (of which the importance matrix saw some)"
    seeds = [read_text(stories, model, dataclasses.replace(options, seed=seed), weighted=True) for seed in (0, 1)]
    assert not all(np.array_equal(a.ids, b.ids) for a, b in zip(seeds[0].batches[0], seeds[1].batches[0], strict=False))


def test_groups_by_name(tmp_path: Path) -> None:
    assert group_of("blk.11.attn_qkv.weight") == "layer 11 attention"
    assert group_of("blk.0.ffn_down.weight") == "layer 0 feed-forward"
    assert [group_of(name) for name in ("token_embd.weight", "output.weight", "token_types.weight")] == [
        "embedding", "head", "token_types",
    ]  # fmt: skip
    model = model_at(tiny(tmp_path / "model", hidden_size=256, intermediate_size=512, head_dim=64))
    request = request_of(tmp_path / "model", model, "IQ4_XS", ExportOptions(importance_matrix="off"))
    ladders = ladders_of(model, request, StoredModel(tmp_path / "model", model, request))
    assert list(ladders) == [
        "embedding", "layer 0 attention", "layer 0 feed-forward", "layer 1 attention", "layer 1 feed-forward", "head",
    ]  # fmt: skip
    group, _ = ladders["layer 0 feed-forward"]
    assert group.types == ("IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
    assert group.bytes[0] == 3 * 256 * 512 * 136 // 256 and group.float_bytes == 3 * 256 * 512 * 2
    assert ladders["head"][0].types == ("Q6_K", "Q8_0")
