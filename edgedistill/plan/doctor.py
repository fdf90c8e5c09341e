"""What this machine can and cannot do, for each target, and how to mend it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import Any

from edgedistill.config.targets import Target, is_this_machine, parse_artifact, targets_list
from edgedistill.errors import EdgedistillError
from edgedistill.fit.artifact import human_bytes
from edgedistill.machine import facts
from edgedistill.store import Store, versions

BUILD_PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "datasets": "datasets",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "huggingface-hub": "huggingface_hub",
    "cyclonedx-python-lib": "cyclonedx",
}
RUNTIME_PACKAGES = {
    "gguf": {"llama-cpp-python": "llama_cpp", "gguf": "gguf"},
    "onnx": {"onnxruntime": "onnxruntime", "onnxruntime-genai": "onnxruntime_genai", "onnx": "onnx"},
    "bitsandbytes": {"bitsandbytes": "bitsandbytes", "torch": "torch", "transformers": "transformers"},
}
EXTRAS = {"gguf": "llama", "onnx": "onnx", "bitsandbytes": "train"}
LITTLE_DISK_BYTES = 2_000_000_000


def doctor(targets: Sequence[Target] | None = None, *, store: Store) -> dict[str, Any]:
    """Checks of this machine and, per target, what is missing to build for it and what its speed here would be."""
    here = facts.describe()
    missing_build = [name for name, module in BUILD_PACKAGES.items() if not _installed(module)]
    missing_runtime = {
        format_: [name for name, module in packages.items() if not _installed(module)]
        for format_, packages in RUNTIME_PACKAGES.items()
    }
    checks = [
        _check(
            "distilling",
            not missing_build,
            f"missing: {', '.join(missing_build)}" if missing_build else _versions("torch", "transformers"),
            "pip install 'edgedistill[build]'",
        )
    ]
    for format_, missing in missing_runtime.items():
        checks.append(
            _check(
                f"{format_} artifacts",
                not missing,
                f"missing: {', '.join(missing)}" if missing else _versions(*RUNTIME_PACKAGES[format_]),
                f"pip install 'edgedistill[{EXTRAS[format_]}]'",
            )
        )
    if not missing_runtime["gguf"]:
        checks.append(_extra_buffers(store))
    checks += [_gpu(here), _threads(here), _store_state(store)]
    return {
        "machine": here,
        "checks": checks,
        "targets": [_target(target, here, missing_build, missing_runtime) for target in targets or targets_list()],
    }


def _check(what: str, good: bool, detail: str, remedy: str, *, bad: str = "missing") -> dict[str, str]:
    return {"what": what, "state": "ok" if good else bad, "detail": detail, "remedy": "" if good else remedy}


def _extra_buffers(store: Store) -> dict[str, str]:
    from edgedistill.runtimes.probe import extra_bufts

    try:
        answer = extra_bufts(store)
    except EdgedistillError as error:
        return _check("llama.cpp runs", False, error.cause, error.remedy, bad="fails")
    if answer.use:
        return _check("llama.cpp extra buffers", True, answer.reason, "")
    return {
        "what": "llama.cpp extra buffers",
        "state": "off",
        "detail": answer.reason,
        "remedy": "nothing: they run without",
    }


def _gpu(here: dict[str, Any]) -> dict[str, str]:
    if not _installed("torch"):
        return _check("GPU for training", False, "torch is not installed", "pip install 'edgedistill[build]'")
    import torch

    if torch.cuda.is_available():
        return _check("GPU for training", True, torch.cuda.get_device_name(0), "")
    found = ", ".join(here.get("gpu") or [])
    if found:
        return _check(
            "GPU for training", False, f"{found}, but torch {torch.__version__} cannot use it",
            "install a CUDA build of torch that fits the driver", bad="unused",
        )  # fmt: skip
    return _check("GPU for training", False, "none: training runs on the CPU", "fine for small models", bad="none")


def _threads(here: dict[str, Any]) -> dict[str, str]:
    asked = os.environ.get("OMP_NUM_THREADS")
    cores = here["usable_cores"]
    good = asked is None or not asked.isdigit() or int(asked) >= cores
    return _check(
        "CPU threads", good, f"{asked or cores} of {cores} cores", "unset OMP_NUM_THREADS to use all cores", bad="few"
    )


def _store_state(store: Store) -> dict[str, str]:
    room = store.root
    while not room.exists():
        room = room.parent
    free = shutil.disk_usage(room).free
    if not os.access(room, os.W_OK):
        return _check(
            "store", False, f"{store.root} cannot be written", "name a folder in EDGEDISTILL_STORE", bad="fails"
        )
    return _check(
        "store", free >= LITTLE_DISK_BYTES, f"{store.root}, {human_bytes(free)} free",
        "edgedistill store prune, or name another disk in EDGEDISTILL_STORE", bad="little room",
    )  # fmt: skip


def _target(
    target: Target, here: dict[str, Any], missing_build: list[str], missing_runtime: dict[str, list[str]]
) -> dict[str, Any]:
    formats = {parse_artifact(artifact)[0] for artifact in target.default_artifacts}
    missing = [*missing_build, *(name for format_ in sorted(formats) for name in missing_runtime[format_])]
    is_target = is_this_machine(target, here)
    return {
        "target": target.name,
        "can_build": not missing,
        "missing": missing,
        "remedy": "pip install 'edgedistill[build]'" if missing else "",
        "speed_basis": "measured" if is_target else "proxy: run `edgedistill bench` on the device for its own",
    }


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _versions(*packages: str) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions(*packages).items())
