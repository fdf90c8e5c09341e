"""optimum-onnx's part of benchmarks/onnx_peers.py: runs in an environment with it, without edgedistill.

    python onnx_peers_optimum.py JOB OUT

JOB is what onnx_peers_models.write_job wrote. OUT gets the models and `result.json`: model → precision → name of the
configuration → file, the versions, and the words of each configuration that failed. Float: the exporter's graph as it
is, and after ORTOptimizer O2 (O3 approximates GELU). INT8: ORTQuantizer on both, with AutoQuantizationConfig.avx2 as it
comes; static ranges by min-max over the job's calibration data. The ResNet is no transformers model: its graph is the job's.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np


def export_classifier(folder: Path, out: Path) -> Path:
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer

    ORTModelForSequenceClassification.from_pretrained(folder, export=True).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out / "model.onnx"


def optimize(graph: Path, out: Path) -> Path:
    from optimum.onnxruntime import ORTModelForSequenceClassification, ORTOptimizer
    from optimum.onnxruntime.configuration import AutoOptimizationConfig

    model = ORTModelForSequenceClassification.from_pretrained(graph.parent)
    ORTOptimizer.from_pretrained(model).optimize(save_dir=out, optimization_config=AutoOptimizationConfig.O2())
    return out / "model_optimized.onnx"


def quantize(graph: Path, out: Path, samples: Iterable[dict[str, Any]] | None) -> Path:
    """Static where there are samples, else dynamic."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoCalibrationConfig, AutoQuantizationConfig

    quantizer = ORTQuantizer.from_pretrained(graph.parent, file_name=graph.name)
    asked = AutoQuantizationConfig.avx2(is_static=samples is not None)
    ranges = None
    if samples is not None:
        calibration = AutoCalibrationConfig.minmax(Samples(samples))
        ranges = quantizer.fit(
            dataset=samples, calibration_config=calibration, operators_to_quantize=asked.operators_to_quantize,
            onnx_augmented_model_name=str(out.with_suffix(".augmented.onnx")),
        )  # fmt: skip
    quantizer.quantize(quantization_config=asked, save_dir=out, calibration_tensors_range=ranges)
    return out / f"{graph.stem}_quantized.onnx"


class Samples(list):
    """What AutoCalibrationConfig asks a data set for its record."""

    info = type("Info", (), {"builder_name": "local", "config_name": ""})
    split = "train"

    @property
    def num_rows(self) -> int:
        return len(self)


def attempt(failed: dict[str, str], name: str, work: Callable[[], Path]) -> Path | None:
    """A configuration that fails is named with its words, and the others go on."""
    try:
        return work()
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return None


def main() -> None:
    import importlib.metadata

    from transformers import AutoTokenizer

    job_folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    job = json.loads((job_folder / "job.json").read_text(encoding="utf-8"))
    encode = AutoTokenizer.from_pretrained(job["classifier"])
    texts = [{name: list(values) for name, values in encode(text, truncation=True).items()} for text in job["texts"]]
    pictures = [{"image": image} for image in np.load(job_folder / "images.npy")]
    failed: dict[str, str] = {}
    made: dict[str, Path | None] = {}
    made["minilm/FP32/export"] = export_classifier(Path(job["classifier"]), out / "export")
    made["minilm/FP32/export, O2"] = attempt(
        failed, "minilm/FP32/O2", lambda: optimize(out / "export" / "model.onnx", out / "o2")
    )
    (out / "resnet").mkdir(exist_ok=True)
    shutil.copyfile(job_folder / "resnet.onnx", out / "resnet" / "model.onnx")
    made["resnet/FP32/as given"] = out / "resnet" / "model.onnx"
    for key, graph in list(made.items()):
        if graph is None:
            continue
        model, _, what = key.split("/")
        samples = texts if model == "minilm" else pictures
        for precision, given in (("INT8-DYNAMIC", None), ("INT8", samples)):
            name = f"{model}/{precision}/{what}"
            folder = out / name.replace("/", "-").replace(", ", "-").replace(" ", "-")
            made[name] = attempt(failed, name, lambda g=graph, f=folder, s=given: quantize(g, f, s))
    packages = ("optimum", "optimum-onnx", "onnxruntime", "onnx", "torch", "transformers")
    result = {
        "made": {name: str(path.relative_to(out)) for name, path in made.items() if path is not None},
        "failed": failed,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    (out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
