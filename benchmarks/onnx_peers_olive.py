"""Olive's part of benchmarks/onnx_peers.py: runs in an environment with it, without edgedistill.

    python onnx_peers_olive.py JOB OUT

JOB and `result.json` are as in onnx_peers_optimum.py. What runs is the list of passes that `olive optimize --provider
CPUExecutionProvider` schedules (its --dry_run writes them), of each exporter that takes an encoder. Changed in it, for it
cannot run here otherwise: calibration on the job's data in place of wikitext-2 from the Hub, on the CPU in place of CUDA.
`optimize` has no dynamic quantization: there Olive's pass OnnxDynamicQuantization comes in place of the static one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

EXPORTERS = {"torchscript": "torchscript_exporter", "dynamo": "dynamo_exporter"}
SCRIPT = """
import json
import numpy as np
import torch
from olive.data.registry import Registry


class Samples(torch.utils.data.Dataset):
    def __init__(self, feeds):
        self.feeds = feeds

    def __len__(self):
        return len(self.feeds)

    def __getitem__(self, index):
        return self.feeds[index]


@Registry.register_dataset()
def peers_texts(job, **_):
    from transformers import AutoTokenizer

    asked = json.load(open(f"{job}/job.json"))
    encode = AutoTokenizer.from_pretrained(asked["classifier"])
    return Samples([dict(encode(text, truncation=True, return_tensors="np")) for text in asked["texts"]])


@Registry.register_dataset()
def peers_images(job, **_):
    return Samples([{"image": image[None]} for image in np.load(f"{job}/images.npy")])
"""


def scheduled(model: str, precision: str, exporter: str | None, out: Path) -> dict[str, Any]:
    """The workflow that `olive optimize` would run."""
    from olive.cli.launcher import main as olive

    command = [
        "optimize", "-m", model, "--provider", "CPUExecutionProvider", "--device", "cpu", "--precision", precision,
        "-o", str(out), "--dry_run", "--use_qdq_format",
    ]  # fmt: skip
    if exporter is not None:
        command += ["--exporter", exporter, "-t", "text-classification"]
    olive(command)
    config: dict[str, Any] = json.loads((out / "config.json").read_text(encoding="utf-8"))
    return config


def run(model: str, precision: str, exporter: str | None, out: Path, job: Path, changes: dict[str, Any]) -> Path:
    """`precision`: fp32, int8 or dynamic. `changes` of the static quantization's settings."""
    from olive.workflows import run as workflow

    out.mkdir(parents=True, exist_ok=True)
    config = scheduled(model, "fp32" if precision == "fp32" else "int8", exporter, out)
    static = config["passes"].pop("onnx_static_quantization", None)
    if precision == "int8":
        static |= {"calibration_providers": ["CPUExecutionProvider"], "data_config": "samples", **changes}
        config["passes"]["onnx_static_quantization"] = static
        script = out / "samples.py"
        script.write_text(SCRIPT, encoding="utf-8")
        kind = "peers_images" if model.endswith(".onnx") else "peers_texts"
        config["data_configs"] = [{
            "name": "samples", "type": "DataContainer", "user_script": str(script),
            "load_dataset_config": {"type": kind, "params": {"job": str(job.resolve())}},
            "pre_process_data_config": {"type": "skip_pre_process"},
            "post_process_data_config": {"type": "skip_post_process"},
            "dataloader_config": {"type": "no_auto_batch_dataloader"},
        }]  # fmt: skip
    else:
        config["data_configs"] = []
    if precision == "dynamic":
        config["passes"]["onnx_dynamic_quantization"] = {"type": "OnnxDynamicQuantization", **changes}
    config["output_dir"] = str(out / "model")
    found = workflow(config)
    if not found.has_output_model():
        raise RuntimeError("Olive gave no model")
    graphs = sorted((out / "model").rglob("*.onnx"))
    if len(graphs) != 1:
        raise RuntimeError(f"Olive wrote {[graph.name for graph in graphs]}")
    return graphs[0]


def attempt(failed: dict[str, str], name: str, work: Callable[[], Path]) -> Path | None:
    """A configuration that fails is named with its words, and the others go on."""
    try:
        return work()
    except (Exception, SystemExit) as error:
        failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def main() -> None:
    import importlib.metadata

    job_folder, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    job = json.loads((job_folder / "job.json").read_text(encoding="utf-8"))
    assert len(np.load(job_folder / "images.npy"))
    failed: dict[str, str] = {}
    made: dict[str, Path | None] = {}
    contenders = [("minilm", name, job["classifier"], exporter) for name, exporter in EXPORTERS.items()]
    contenders.append(("resnet", "as given", str(job_folder / "resnet.onnx"), None))
    kinds: list[tuple[str, str, str, dict[str, Any]]] = [
        ("FP32", "fp32", "", {}),
        ("INT8-DYNAMIC", "dynamic", "", {}),
        ("INT8", "int8", "", {}),
        ("INT8", "int8", ", uint8 activations", {"activation_type": "uint8"}),
    ]
    for precision, kind, suffix, changes in kinds:
        for model, name, source, exporter in contenders:
            key = f"{model}/{precision}/{name}{suffix}"
            folder = out / key.replace("/", "-").replace(", ", "-").replace(" ", "-")
            made[key] = attempt(
                failed, key, lambda s=source, k=kind, e=exporter, f=folder, c=changes: run(s, k, e, f, job_folder, c)
            )
    packages = ("olive-ai", "onnxruntime", "onnx", "torch", "transformers")
    result = {
        "made": {name: str(path.relative_to(out)) for name, path in made.items() if path is not None},
        "failed": failed,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    (out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
