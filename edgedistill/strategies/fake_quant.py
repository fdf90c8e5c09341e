"""Fake quantization: the model computes with the weights that the artifact will store, its masters are trained.

Straight through (Bengio et al. 2013): the gradient at the stored values is applied to the fp32 masters. The stored
values come from the converter's own rounding and the runtimes' own quantizers (`gguf/ggml.py`, `onnx/blocks.py`), so
that what training sees is what ships, bit for bit. A parameter that two modules share (a tied head) stays shared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch  # noqa: TID253  this module is imported by training alone
from numpy.typing import NDArray
from torch import nn  # noqa: TID253

from edgedistill.errors import UserError
from edgedistill.gguf.stored import as_converted, as_in_torch, gguf_values
from edgedistill.onnx.blocks import decoder_values
from edgedistill.progress import QUIET, Progress
from edgedistill.quantization.options import DEFAULT_OPTIONS, ExportOptions
from edgedistill.strict import read_json

HEAD = "lm_head.weight"
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Rounding:
    """What an artifact stores of each parameter: transformers' name → type, read from a file of that kind.

    `importance`: name → [in] of the importance matrix, for the tensors that have one; `changes`: name → what the
    converter does with its values (GGUF).
    """

    format: Literal["gguf", "onnx"]
    quantization: str
    types: Mapping[str, str]
    importance: Mapping[str, Floats] = field(default_factory=dict)
    changes: Mapping[str, str] = field(default_factory=dict)

    def stored(self, name: str, values: Floats, *, threads: int = 1) -> Floats:
        """`values` (fp32, in torch's layout [out, in]) as the artifact holds them. UserError where it holds no such."""
        if name not in self.types:
            raise UserError(
                f"the {self.format} file holds no {name}", "quantize the model that the rounding was made for"
            )
        if self.format == "onnx":
            return decoder_values(values, self.types[name])
        changed = as_converted(values, self.changes.get(name, ""))
        kept = gguf_values(changed, self.types[name], self.importance.get(name), tensor=name, threads=threads)
        return as_in_torch(kept, self.changes.get(name, ""))


def rounding_of(
    checkpoint: Path,
    artifact_format: str,
    quantization: str,
    *,
    scratch: Path,
    options: ExportOptions = DEFAULT_OPTIONS,
    context_tokens: int = 256,
    progress: Progress = QUIET,
) -> Rounding:
    """The rounding of `quantization` for this checkpoint: exported once into `scratch`, and its types read back.

    So the types are those that llama.cpp or the builder really choose, fallbacks at odd widths included. An importance
    matrix is the one of `options.importance_file`, or there is none: one that the export computes itself would follow
    the weights. Raises UserError for what cannot be exported.
    """
    from edgedistill.export.stage import write_artifact

    if options.importance_file is None:
        options = dataclasses.replace(options, importance_matrix="off")
    artifact = write_artifact(
        checkpoint, scratch, format_=artifact_format, quantization=quantization, context_tokens=context_tokens,
        name="rounding", options=options, checked=False, progress=progress,
    )  # fmt: skip
    config = read_json(checkpoint / "config.json", what="config.json")
    if artifact_format == "onnx":
        from edgedistill.onnx.dequantize import stored

        return Rounding("onnx", quantization, {name: kind for name, kind, _ in stored(scratch, config)})
    from edgedistill.gguf.dequantize import stored_types
    from edgedistill.gguf.importance import gguf_importance, read_importance
    from edgedistill.models.architectures import model_of

    specs = model_of(config, where=str(checkpoint)).specs
    importance: dict[str, Floats] = {}
    if options.importance_file is not None:
        by_gguf = gguf_importance(read_importance(options.importance_file), specs)
        importance = {name: by_gguf[spec.gguf_name] for name, spec in specs.items() if spec.gguf_name in by_gguf}
    changes = {name: spec.change for name, spec in specs.items() if spec.change}
    return Rounding("gguf", quantization, stored_types(scratch / artifact.entry), importance, changes)


class FakeQuantizer:
    """Puts the stored values into a model for as long as a pass over it lasts; the masters come back after it."""

    def __init__(self, model: nn.Module, rounding: Rounding, *, threads: int = 1) -> None:
        """UserError where the model has a parameter that the artifact has not, or the other way round."""
        self.model = model
        self.rounding = rounding
        self.threads = threads
        self.parameters = dict(model.named_parameters())
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        # onnxruntime-genai stores a tied head at 8 bits beside an embedding in floating point
        self.head: Any = head if HEAD in rounding.types and HEAD not in self.parameters else None
        known = set(self.parameters) | ({HEAD} if self.head is not None else set())
        if known != set(rounding.types):
            odd = sorted(known ^ set(rounding.types))
            raise UserError(
                f"the model and the {rounding.format} file differ in {len(odd)} tensors, e.g. {odd[0]}",
                "this family cannot be trained under its rounding yet: set distill.qad.tokens_share=0",
            )

    def values(self, name: str) -> torch.Tensor:
        """What the artifact stores of the parameter `name`, on its device."""
        master = self.parameters.get(name)
        master = self.head.weight if master is None else master
        array = np.ascontiguousarray(master.detach().float().cpu().numpy())
        return torch.from_numpy(self.rounding.stored(name, array, threads=self.threads)).to(master)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with its stored weights; gradients that are made inside belong to the masters after."""
        masters = {name: parameter.data for name, parameter in self.parameters.items()}
        separate = self.values(HEAD) if self.head is not None else None
        tied = None
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.values(name)
            if separate is not None:
                tied = self.head.weight
                self.head.weight = nn.Parameter(separate)
            yield
        finally:
            for name, data in masters.items():
                self.parameters[name].data = data
            if tied is not None:
                gradient = self.head.weight.grad
                self.head.weight = tied
                if gradient is not None:
                    tied.grad = gradient if tied.grad is None else tied.grad + gradient
