"""Child process of the ONNX export: the onnxruntime-genai builder.

`python -m edgedistill.onnx.builder_child REQUEST.json`. In a process of its own, so that a builder that dies or runs
out of memory does not take the build with it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path


def build(checkpoint: Path, out: Path, cache: Path, precision: str, options: list[str], *, separate_rope: bool) -> None:
    """Write the onnxruntime-genai folder `out` of a transformers folder.

    `separate_rope`: rotary embedding as a node of its own instead of inside GroupQueryAttention, which
    refuses head sizes that are no multiple of 16 when it has to rotate them. The builder has no option for it.
    """
    # Its modules import each other as top-level ones: before any file of that name beside the user's script.
    spec = importlib.util.find_spec("onnxruntime_genai")
    if spec is not None:
        sys.path[:0] = [str(Path(place) / "models") for place in spec.submodule_search_locations or ()]
    from onnxruntime_genai.models import builder

    if separate_rope:
        builder.Model.is_fused_rope_supported = lambda _self: False
    prepared = builder.parse_extra_options("", str(checkpoint), str(out), precision, "cpu", str(cache), options)
    builder.create_model("", str(checkpoint), str(out), precision, "cpu", str(cache), **prepared)


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch

    torch.set_num_threads(int(request["threads"]))
    build(
        Path(request["checkpoint"]),
        Path(request["out"]),
        Path(request["cache"]),
        request["precision"],
        request["options"],
        separate_rope=bool(request["separate_rope"]),
    )


if __name__ == "__main__":
    main()
