"""Run by an interpreter that has ExecuTorch: `executorch_child.py REQUEST.json`. Imports nothing of edgedistill.

Writes model.pte, and report.json with the differences of its logits in ExecuTorch's Python runtime from torch's.
The program takes `input_ids` [1, T] int64, 2 ≤ T ≤ context, and gives logits [1, T, V] float32; it has no KV cache.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

GROUP = 32  # weights of a row that share a scale, as XNNPACK's 4-bit kernels take them


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(int(request["threads"]))
    wrapped = _wrapped(request["checkpoint"])
    original = [wrapped(torch.tensor([ids])) for ids in request["sequences"]]
    if request["quantization"] == "8DA4W":
        _quantize(wrapped)
    stored = [wrapped(torch.tensor([ids])) for ids in request["sequences"]]
    program = _lower(wrapped, request["sequences"][0], int(request["context"]))
    out = Path(request["out"])
    with (out / "model.pte").open("wb") as file:
        program.write_to_file(file)
    found = _run(out / "model.pte", request["sequences"])
    versions = {name: importlib.metadata.version(name) for name in ("executorch", "torch", "torchao", "transformers")}
    delegated = sum(len(plan.delegates) for plan in program.executorch_program.execution_plan)
    report = {"versions": versions, "delegates": delegated, "vocab_size": int(found[0].shape[-1])}
    report["stored"] = _differences(found, [one.numpy() for one in stored])
    report["original"] = _differences(found, [one.numpy() for one in original])
    Path(request["report"]).write_text(json.dumps(report), encoding="utf-8")


def _wrapped(folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, return_dict=True,
                output_hidden_states=False, output_attentions=False, _attn_implementation="sdpa",
            ).eval()  # fmt: skip

        @torch.no_grad()
        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.model(input_ids=input_ids, use_cache=False).logits

    return Logits().eval()


def _quantize(wrapped: Any) -> None:
    """8-bit dynamic activations a token, 4-bit symmetric weights a group, of every linear layer, the head too."""
    import torch
    from torchao.quantization import quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_api import Int8DynamicActivationIntxWeightConfig

    model = wrapped.model
    if model.config.tie_word_embeddings:  # the embedding is looked up and stays float: the head gets its own weights
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    int4: Any = vars(torch)["int4"]  # torch's stubs do not name it
    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=int4, weight_granularity=PerGroup(GROUP))
    quantize_(wrapped, config)


def _lower(wrapped: Any, ids: list[int], context: int) -> Any:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    tokens = torch.export.Dim("tokens", min=2, max=context)
    exported = torch.export.export(
        wrapped, (torch.tensor([ids]),), dynamic_shapes={"input_ids": {1: tokens}}, strict=False
    )
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    return edge.to_executorch()


def _run(path: Path, sequences: list[list[int]]) -> list[Any]:
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(str(path)).load_method("forward")
    return [method.execute([torch.tensor([ids])])[0].clone().numpy() for ids in sequences]


def _differences(found: list[Any], expected: list[Any]) -> dict[str, float]:
    difference = np.concatenate([(f.astype(np.float64) - e).reshape(-1) for f, e in zip(found, expected, strict=True)])
    centred = np.concatenate([(e - e.mean(-1, keepdims=True)).reshape(-1) for e in expected]).astype(np.float64)
    return {
        "values": difference.size,
        "max_abs": float(np.abs(difference).max()),
        "mean_abs": float(np.abs(difference).mean()),
        "relative_rms": float(np.sqrt(np.square(difference).sum() / np.square(centred).sum())),
    }


if __name__ == "__main__":
    main()
