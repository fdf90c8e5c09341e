"""What of a runtime can change a result or a speed beyond its version; part of the keys of verify and bench."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from edgedistill.runtimes.probe import extra_bufts, llama_build
from edgedistill.store import Store, versions


def runtime_facts(runtime: str, store: Store) -> dict[str, Any]:
    """For llama.cpp its build, and whether it runs with its extra buffers here; for transformers what computes."""
    if runtime == "transformers":
        return {"versions": versions("bitsandbytes", "torch", "transformers")}
    if runtime != "llama.cpp":
        return {}
    return {"build": llama_build(store), "extra_bufts": asdict(extra_bufts(store))}
