"""What a change that should change nothing must leave as it is: bytes of exports, losses, and what records hold.

`python tests/helpers/pins.py` prints them; `--write` puts them into pins.json. Bytes are those of one set of library
versions; losses and perplexities differ a little from CPU to CPU, and test_pins.py allows for that.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

PINS = Path(__file__).with_name("pins.json")
LIBRARIES = ("torch", "transformers", "gguf", "llama-cpp-python", "onnx", "onnxscript", "onnxruntime")
GGUF = ("F16", "Q8_0", "Q4_K_M")
ONNX = ("FP32", "INT8-DYNAMIC")
STEPS = 20


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def exports(folder: Path) -> dict[str, str]:
    """Format and quantization → sha256 of the file that the command writes: a random decoder, a random encoder."""
    from checkpoints import tiny
    from command import Command
    from encoders import tiny_encoder

    decoder, encoder = tiny(folder / "decoder"), tiny_encoder(folder / "encoder", "bert")
    asked = [("gguf", decoder, name, "model.gguf") for name in GGUF]
    asked += [("onnx", encoder, name, "model.onnx") for name in ONNX]
    command = Command(folder, warm=True)
    found = {}
    for form, model, quantization, file in asked:
        out = folder / f"{form}-{quantization}"
        done = command(
            "export", "--student", str(model), "--format", form, "--quantization", quantization, "--out", str(out)
        )
        assert done.returncode == 0, done.stderr
        found[f"{form} {quantization}"] = sha256(out / file)
    return found


def losses(folder: Path) -> list[float]:
    """The loss of each of twenty steps."""
    from training_models import model, run

    result = run(model(), folder / "training", tokens=16 * 4 * STEPS, evaluate_every_share=1 / STEPS)
    return [row["loss"] for row in result.history]


def keys_of(value: Any, path: str = "") -> set[str]:
    """The paths of a JSON document; the entries of a list count as one, those of hashes and versions by name too."""
    if isinstance(value, dict):
        return {path} | {key for name, one in value.items() for key in keys_of(one, f"{path}/{name}")}
    if isinstance(value, list):
        return {path} | {key for one in value for key in keys_of(one, f"{path}[]")}
    return {path}


def records(folder: Path) -> dict[str, Any]:
    """A small build: the names in each JSON document of its bundle, its files, and each rung's perplexity."""
    from command import Command

    command = Command(folder, warm=True)
    done = command("build", command.recipe(), "-t", "phone", "--json")
    assert done.returncode == 0, done.stderr
    bundle = folder / "bundles" / "tiny-phone-arm64-high"
    documents = {
        path.relative_to(bundle).as_posix(): json.loads(path.read_text())
        for path in (bundle / "manifest.json", *sorted((bundle / "reports").glob("*.json")))
    }
    rungs = documents["reports/retention.json"]["rungs"]
    return {
        "files": sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()),
        "keys": {name: sorted(keys_of(value)) for name, value in documents.items()},
        "perplexity": {rung["rung"]: rung["perplexity"] for rung in rungs},
    }


def machine() -> dict[str, Any]:
    """What bytes depend on beside the libraries: how a CPU rounds sums decides what a quantizer picks in a tie."""
    from edgedistill.machine.facts import describe

    here = describe()
    return {"arch": here["arch"], "isa": here["isa"]}


def found(folder: Path) -> dict[str, Any]:
    made = {name: folder / name for name in ("exports", "losses", "records")}
    for each in made.values():
        each.mkdir()
    return {
        "versions": {name: version(name) for name in LIBRARIES},
        "machine": machine(),
        "exports": exports(made["exports"]),
        "losses": losses(made["losses"]),
        "records": records(made["records"]),
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as scratch:
        text = json.dumps(found(Path(scratch)), indent=1)
    if "--write" in sys.argv:
        PINS.write_text(text + "\n")
    print(text)
