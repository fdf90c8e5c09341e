"""What ships for TensorRT: standard graphs, and a script of which all but the calls of trtexec runs here."""

from __future__ import annotations

import importlib.util
import json
import py_compile
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoints import tiny
from encoders import tiny_encoder

from edgedistill.errors import UserError
from edgedistill.export.stage import write_artifact
from edgedistill.onnx.tensorrt import require_tensorrt
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.artifact import Artifact

SCRIPT = Path(__file__).resolve().parents[2] / "edgedistill" / "onnx" / "build_engine.py"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("build_engine", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exported(checkpoint: Path, out: Path, quantization: str = "FP32", **options: Any) -> Artifact:
    return write_artifact(
        checkpoint, out, format_="onnx", quantization=quantization, context_tokens=0, name="x",
        options=ExportOptions(tensorrt=True, **options),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tensorrt")
    exported(tiny_encoder(root / "model", "bert"), root / "out")
    return root / "out"


@pytest.mark.parametrize("kind", ["bert", "roberta", "vit", "resnet"])
@pytest.mark.parametrize("quantization", ["FP32", "FP16"])
def test_graphs_hold_standard_operators_only(tmp_path: Path, kind: str, quantization: str) -> None:
    made = exported(tiny_encoder(tmp_path / "model", kind), tmp_path / "out", quantization)
    model = onnx.load(str(tmp_path / "out" / "model.onnx"))
    onnx.checker.check_model(model, full_check=quantization == "FP32")
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")] == [18]
    assert made.parity is not None and made.parity.relative_rms <= made.parity.limit
    assert any("never run on one" in note for note in made.notes)
    settings = json.loads((tmp_path / "out" / "tensorrt.json").read_text())
    assert [entry["name"] for entry in settings["inputs"]] == [spec.name for spec in made.inputs]
    assert set(settings["axes"]) == {dim for spec in made.inputs for dim in spec.shape if isinstance(dim, str)}
    assert settings["limit"] == made.parity.limit
    assert {"build_engine.py", "tensorrt.json"} <= {file.path for file in made.files}


def test_the_script_and_the_golden_vectors_come_from_the_artifact(folder: Path) -> None:
    from edgedistill.runtimes.graph import GraphProcess

    py_compile.compile(str(folder / "build_engine.py"), doraise=True)
    assert (folder / "build_engine.py").read_bytes() == SCRIPT.read_bytes()
    settings = json.loads((folder / "tensorrt.json").read_text())
    module = script()
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert module.shapes(settings["inputs"], settings["axes"], 0) == ",".join(f"{name}:1x1" for name in names)
    assert module.shapes(settings["inputs"], settings["axes"], 2) == ",".join(f"{name}:8x64" for name in names)
    with GraphProcess(folder / "model.onnx", threads=1) as process:
        for case in settings["cases"]:
            inputs = {
                name: np.fromfile(folder / entry["file"], dtype=f"<{np.dtype(entry['dtype']).str[1:]}").reshape(
                    entry["shape"]
                )
                for name, entry in case["inputs"].items()
            }
            for name, found in process.run(inputs).items():
                entry = case["outputs"][name]
                expected = np.fromfile(folder / entry["file"], dtype="<f4").reshape(entry["shape"])
                np.testing.assert_array_equal(found, expected)


def test_only_the_standard_library_is_imported() -> None:
    import ast

    names = {
        alias.name.partition(".")[0]
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in ([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) else node.names)
    }
    assert names <= set(sys.stdlib_module_names)


def exported_as_trtexec_does(outputs: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The text that trtexec's exportJSONOutput writes (NVIDIA/TensorRT, samples/common/sampleReporting.cpp)."""
    text, separator = "[\n", "  "
    for name, values in outputs.items():
        text += f'{separator}{{ "name" : "{name}"\n  , "dimensions" : "{"x".join(map(str, values.shape))}"\n'
        text += f'  , "values" : [ {", ".join(f"{value:g}" for value in values.reshape(-1))} ]\n  }}\n'
        separator = ", "
    return json.loads(text + "]\n")  # type: ignore[no-any-return]


def test_outputs_are_compared_by_name_shape_and_value(folder: Path) -> None:
    """The script as it lies in the artifact, on onnxruntime's outputs of another session and on wrong ones."""
    spec = importlib.util.spec_from_file_location("shipped", folder / "build_engine.py")
    assert spec is not None and spec.loader is not None
    shipped = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shipped)
    settings = json.loads((folder / "tensorrt.json").read_text())
    for case in settings["cases"]:
        right = {
            name: np.fromfile(folder / entry["file"], dtype="<f4").reshape(entry["shape"])
            for name, entry in case["outputs"].items()
        }
        assert shipped.compare(exported_as_trtexec_does(right), case) < settings["limit"]
        scaled = {name: values * 1.5 for name, values in right.items()}
        assert shipped.compare(exported_as_trtexec_does(scaled), case) > 0.1
        flat = {name: values.reshape(-1) for name, values in right.items()}
        assert shipped.compare(exported_as_trtexec_does(flat), case) == float("inf")
        assert shipped.compare([], case) == float("inf")


def test_the_commands_name_the_graph_its_shapes_and_its_inputs(folder: Path) -> None:
    module = script()
    settings = json.loads((folder / "tensorrt.json").read_text())
    command = module.build_command("trtexec", settings, settings["axes"], folder / "model.engine")
    words = dict(word.lstrip("-").split("=", 1) for word in command[1:] if "=" in word)
    assert Path(words["onnx"]).name == "model.onnx" and Path(words["saveEngine"]).name == "model.engine"
    assert {"--stronglyTyped", "--noTF32", "--skipInference"} <= set(command)
    assert words["minShapes"].startswith("input_ids:1x1,") and words["maxShapes"].startswith("input_ids:8x64,")
    case = settings["cases"][0]
    command = module.run_command("trtexec", folder / "model.engine", case, folder / "output.json")
    words = dict(word.lstrip("-").split("=", 1) for word in command[1:] if "=" in word)
    assert [pair.split(":")[0] for pair in words["loadInputs"].split(",")] == list(case["inputs"])
    shape = "x".join(map(str, case["inputs"]["input_ids"]["shape"]))
    assert words["shapes"].startswith(f"input_ids:{shape},")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--axis", "width=1,2,3"), "no axis 'width'"),
        (("--axis", "sequence=4,2,3"), "the sizes must rise"),
        (("--axis", "sequence=one"), "write sequence=SMALLEST,USUAL,LARGEST"),
        (("--axis", "sequence=1,2,3"), "must hold the golden vectors'"),
        (("--trtexec", "/nowhere/trtexec"), "no trtexec at /nowhere/trtexec"),
    ],
)
def test_what_the_script_refuses(folder: Path, words: tuple[str, ...], said: str) -> None:
    command = [sys.executable, str(folder / "build_engine.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


def test_an_old_tensorrt_is_refused() -> None:
    module = script()
    assert module.require_version("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # x", [10, 0]) == (10, 3)
    assert module.require_version("no banner", [10, 0]) is None
    with pytest.raises(SystemExit, match=r"TensorRT 8\.6 is too old"):
        module.require_version("&&&& RUNNING TensorRT.trtexec [TensorRT v8602] # x", [10, 0])


def test_numbers_of_versions_and_errors() -> None:
    module = script()
    assert [module.version_of(n) for n in (8503, 8602, 100000, 100300, 101303)] == [
        (8, 5), (8, 6), (10, 0), (10, 3), (10, 13),
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    expected, found = rng.normal(size=50), rng.normal(size=50)
    slow = np.sqrt(np.mean((found - expected) ** 2)) / expected.std()
    assert module.relative_rms(list(found), list(expected)) == pytest.approx(float(slow))
    assert [module.percentile([3.0, 1.0, 2.0], share) for share in (0.0, 0.5, 0.75, 1.0)] == [1.0, 2.0, 2.5, 3.0]
    assert module.relative_rms([float("nan")], [1.0]) == float("inf") == module.relative_rms([1.0], [1.0, 2.0])


def test_fused_operators_are_refused(tmp_path: Path) -> None:
    write_artifact(
        tiny_encoder(tmp_path / "model", "bert"), tmp_path / "out", format_="onnx", quantization="FP32",
        context_tokens=0, name="x",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"com\.microsoft::Attention.*which TensorRT does not know") as caught:
        require_tensorrt(tmp_path / "out" / "model.onnx")
    assert "export.tensorrt=true" in caught.value.remedy


@pytest.mark.parametrize("kind", ["QInt8", "QUInt8"])
def test_int8_about_zero_alone_is_taken(folder: Path, tmp_path: Path, kind: str) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            ids = np.arange(2, 12, dtype=np.int64)[None]
            self.batches = iter([dict.fromkeys(("input_ids", "attention_mask"), ids) | {"token_type_ids": ids * 0}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    quantize_static(
        str(folder / "model.onnx"), str(tmp_path / "model.onnx"), Reader(), quant_format=QuantFormat.QDQ,
        activation_type=QuantType[kind], weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"],
        extra_options={"ActivationSymmetric": kind == "QInt8", "WeightSymmetric": True},
    )  # fmt: skip
    if kind == "QInt8":
        require_tensorrt(tmp_path / "model.onnx")
    else:
        with pytest.raises(UserError, match=r"quantizes to UINT8 with a zero point") as caught:
            require_tensorrt(tmp_path / "model.onnx")
        assert "export.int8_scheme=s8s8" in caught.value.remedy


@pytest.mark.parametrize(("format_", "quantization"), [("onnx", "INT4"), ("gguf", "Q8_0")])
def test_decoders_are_refused(tmp_path: Path, format_: str, quantization: str) -> None:
    with pytest.raises(UserError, match="has operators that TensorRT lacks") as caught:
        write_artifact(
            tiny(tmp_path / "model"), tmp_path / "out", format_=format_, quantization=quantization, context_tokens=64,
            name="x", options=ExportOptions(tensorrt=True),
        )  # fmt: skip
    assert "GGUF" in caught.value.remedy and not (tmp_path / "out").exists()


def test_a_decoder_with_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a decoder with a cache"):
        exported(tiny_encoder(tmp_path / "model", "t5"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
