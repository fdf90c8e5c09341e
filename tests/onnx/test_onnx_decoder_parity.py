"""ONNX decoders' parity: the figures of right graphs, and broken ones whose error names the tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import copy, edit_json, tiny

from edgedistill.errors import UserError
from edgedistill.export.stage import write_artifact
from edgedistill.machine import facts
from edgedistill.onnx.decoder_parity import LIMITS, check_decoder, check_weights, torch_outputs, traced
from edgedistill.quantization.options import NOT_COMPARED, ExportOptions
from edgedistill.records.artifact import Artifact

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},  # rotated by nodes of their own
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parity")
    return {kind: tiny(root / kind, kind, **changes) for kind, changes in KINDS.items()}


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Exports that tests read, or copy and break; each is built once, when it is first asked for."""

    class Built(dict[tuple[str, str], Path]):
        def __missing__(self, key: tuple[str, str]) -> Path:
            folder = tmp_path_factory.mktemp("-".join(key)) / "out"
            made = exported(checkpoints[key[0]], folder, key[1])
            (folder.parent / "artifact.json").write_text(made.model_dump_json())
            self[key] = folder
            return folder

    return Built()


def exported(checkpoint: Path, out: Path, quantization: str, **options: Any) -> Artifact:
    return write_artifact(
        checkpoint, out, format_="onnx", quantization=quantization, context_tokens=128, name="tiny",
        options=ExportOptions(**options),
    )  # fmt: skip


def checked(checkpoint: Path, folder: Path, quantization: str, **changes: Any) -> Any:
    return check_decoder(checkpoint, folder, quantization=quantization, context_tokens=128, **changes)


def change_initializer(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> str:
    """Overwrite the first stored array whose name begins so, where it lies in the external file."""
    from edgedistill.onnx.graph import load_graph, read_initializer

    tensor = next(t for t in load_graph(folder).graph.initializer if t.name.startswith(name))
    values = change(read_initializer(tensor, folder))
    where = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / where["location"]).open("r+b") as file:
        file.seek(int(where.get("offset", 0)))
        file.write(np.ascontiguousarray(values).tobytes())
    return str(tensor.name)


def change_graph(folder: Path, change: Callable[[Any], None]) -> None:
    import onnx

    path = folder / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        change(node)
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", ["FP32", "INT8", "INT4"])
def test_every_export_records_its_parity(folders: Any, kind: str, quantization: str) -> None:
    record = (folders[kind, quantization].parent / "artifact.json").read_text()
    parity = Artifact.model_validate_json(record).parity
    assert parity is not None and parity.reference == ("original" if quantization == "FP32" else "stored")
    assert 0 < parity.relative_rms < parity.limit / 3 and parity.limit == LIMITS[quantization]
    assert 0 < parity.mean_abs_difference < parity.max_abs_difference
    assert parity.runtime.startswith("onnxruntime-genai") and parity.greedy_tokens == 16
    if quantization == "FP32":
        assert parity.greedy_tokens_equal == parity.greedy_compared > 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", ["FP32", "INT4"])
def test_the_trace_agrees_with_torch_tensor_by_tensor(
    checkpoints: dict[str, Path], folders: Any, kind: str, quantization: str
) -> None:
    """No tensor is taken for another, none is left out, and nothing of the trace stays."""
    from edgedistill.onnx.dequantize import dequantized
    from edgedistill.runtimes.parity import Differences
    from edgedistill.runtimes.runners import with_weights
    from edgedistill.strict import read_json

    folder = folders[kind, quantization]
    files = sorted(path.name for path in folder.iterdir())
    ids = np.arange(1, 40)
    config = read_json(checkpoints[kind] / "config.json", what="config.json")
    expected = torch_outputs(with_weights(checkpoints[kind], dequantized(folder, config)), ids)
    seen = set()
    for tensor, modules, values in traced(checkpoints[kind], folder, ids):
        found = Differences()
        found.add(values.reshape(len(ids), -1), np.concatenate([expected[m] for m in modules], axis=1))
        assert found.relative_rms < (1e-4 if quantization == "FP32" else 0.1), (tensor, modules)
        seen.update(modules)
    leaves = {name for name in expected if not name.endswith("<")}
    assert leaves <= seen and {f"model.layers.{i}.self_attn.o_proj <" for i in range(2)} <= seen
    assert sorted(path.name for path in folder.iterdir()) == files


def test_a_scaled_weight_is_named(checkpoints: dict[str, Path], folders: Any, tmp_path: Path) -> None:
    whole = folders["llama", "FP32"]
    folder = copy(whole, tmp_path / "scaled")
    change_initializer(folder, "model.layers.1.mlp.down_proj", lambda values: values * np.float32(1.1))
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj\.weight \(FP32\).*1\.100 times"):
        checked(checkpoints["llama"], folder, "FP32")
    folder = copy(whole, tmp_path / "rows")
    change_initializer(folder, "model.layers.0.mlp.up_proj", lambda values: values[:, ::-1])
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        check_weights(checkpoints["llama"], folder)
    folder = copy(whole, tmp_path / "nan")
    change_initializer(folder, "model.layers.0.input_layernorm", lambda values: values * np.float32("nan"))
    with pytest.raises(UserError, match=r"model\.layers\.0\.input_layernorm\.weight"):
        check_weights(checkpoints["llama"], folder)


def test_scales_of_a_quantized_weight_are_named(checkpoints: dict[str, Path], folders: Any, tmp_path: Path) -> None:
    folder = copy(folders["qwen2", "INT4"], tmp_path / "out")
    name = change_initializer(
        folder, "model.layers.1.mlp.gate_proj.MatMul.weight_scale", lambda values: values * values.dtype.type(1.1)
    )
    assert "scale" in name
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight \(INT4\).*1\.\d+ times"):
        checked(checkpoints["qwen2"], folder, "INT4")


@pytest.mark.parametrize("quantization", ["FP32", "INT8"])
def test_another_epsilon_is_found_at_its_norm(
    checkpoints: dict[str, Path], folders: Any, quantization: str, tmp_path: Path
) -> None:
    """The weights are right and the graph is not: only running it tells, and bisecting says where."""
    folder = copy(folders["llama", quantization], tmp_path / "out")

    def change(node: Any) -> None:
        if "layers.1.post_attention_layernorm.weight" in " ".join(node.input):
            next(a for a in node.attribute if a.name == "epsilon").f = 50.0

    change_graph(folder, change)
    with pytest.raises(
        UserError, match=r"the first tensor that departs is \S+ \(model\.layers\.1\.post_attention_layernorm\)"
    ):
        checked(checkpoints["llama"], folder, quantization)


def test_another_scale_of_attention_is_found_where_its_output_enters(
    checkpoints: dict[str, Path], folders: Any, tmp_path: Path
) -> None:
    folder = copy(folders["qwen3", "FP32"], tmp_path / "out")

    def change(node: Any) -> None:
        if node.op_type == "GroupQueryAttention":
            next(a for a in node.attribute if a.name == "scale").f = 1.0

    change_graph(folder, change)
    with pytest.raises(UserError, match=r"departs is \S+ \(model\.layers\.0\.self_attn\.o_proj <\).*all before it"):
        checked(checkpoints["qwen3"], folder, "FP32")


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real wrong export: the builder is shown another rope_theta than torch."""
    import edgedistill.onnx.decoder as decoder

    checkpoint = tiny(tmp_path / "model")
    stage = decoder._stage

    def stage_another_rope(*arguments: Any) -> Path:
        staged = stage(*arguments)
        edit_json(staged / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 3.0})
        return staged

    monkeypatch.setattr(decoder, "_stage", stage_another_rope)
    with pytest.raises(UserError, match=r"departs is \S+ \(model\.layers\.0\.self_attn\.o_proj <\)"):
        exported(checkpoint, tmp_path / "out" / "onnx", "INT4")
    assert list((tmp_path / "out").iterdir()) == []


def test_calibration_text_is_what_parity_runs_on(checkpoints: dict[str, Path], folders: Any) -> None:
    text = [["lily loved to play outside", "and more"]]
    parity = checked(checkpoints["llama"], folders["llama", "INT8"], "INT8", calibration=text)
    assert parity.inputs.startswith("1 sequences") and parity.inputs.endswith("calibration text")


@pytest.mark.parametrize(("format_", "quantization"), [("onnx", "INT4"), ("gguf", "Q8_0")])
def test_without_the_logits_the_weights_are_compared_and_the_record_says_so(
    checkpoints: dict[str, Path], format_: str, quantization: str, tmp_path: Path
) -> None:
    made = write_artifact(
        checkpoints["llama"], tmp_path / "out", format_=format_, quantization=quantization, context_tokens=128,
        name="tiny", options=ExportOptions(compare_logits=False, compare_speed=False),
    )  # fmt: skip
    assert made.parity is None and NOT_COMPARED in made.notes


@pytest.mark.parametrize(("format_", "quantization"), [("onnx", "INT4"), ("gguf", "F16")])
def test_too_little_memory_is_refused_before_any_work(
    checkpoints: dict[str, Path], format_: str, quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "available_bytes", lambda: 100_000)
    with pytest.raises(UserError, match=r"takes about .* of memory, and 100 kB are free") as caught:
        write_artifact(
            checkpoints["llama"], tmp_path / "out", format_=format_, quantization=quantization, context_tokens=128,
            name="tiny",
        )  # fmt: skip
    assert "--set export.compare_logits=false" in caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_free_memory_is_what_the_system_says() -> None:
    free = facts.available_bytes()
    assert free is not None and 0 < free <= (facts.describe()["memory_bytes"] or free)
