"""Programs for phones: what ExecuTorch's own runtime computes is what torch does, and what cannot be is refused.

stories260k-hf as FP32, and a student as 8DA4W (a random Llama 256 wide with its tokenizer, or --student), both lowered
to XNNPACK and run in ExecuTorch's Python runtime on this CPU. Claims: FP32's logits lie within 1e-5 of their spread of
torch's, 8DA4W's within 0.1 of torch with the same quantized model; 8DA4W of stories260k, whose matrices of 172 columns
have no whole groups, is refused. Bytes are of model.pte; what a phone's speed is nobody knows here.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import Bound, finish, parser
from export_fidelity import DATA
from transformers import LlamaConfig, LlamaForCausalLM

from edgedistill.errors import UserError
from edgedistill.export.stage import write_artifact
from edgedistill.records.artifact import Artifact

CONTEXT_TOKENS = 256
SHAPE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 512, "initializer_range": 0.1,
}  # fmt: skip


def random_student(folder: Path, tokenizer: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


def exported(checkpoint: Path, out: Path, quantization: str) -> tuple[Artifact, int, float]:
    """The artifact, the bytes of its program, and the seconds that it took."""
    started = time.perf_counter()
    made = write_artifact(
        checkpoint, out, format_="executorch", quantization=quantization, context_tokens=CONTEXT_TOKENS, name="student"
    )
    return made, (out / made.entry).stat().st_size, time.perf_counter() - started


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--model", default=str(DATA / "weights" / "stories260k-hf"))
    asked.add_argument("--student", help="a checkpoint whose widths are multiples of 32; default: a random one")
    arguments = asked.parse_args()
    model = Path(arguments.model)
    figures: dict[str, Any] = {}
    rows, bounds = [], []
    with tempfile.TemporaryDirectory(prefix="edgedistill-executorch-") as scratch:
        student = Path(arguments.student or random_student(Path(scratch) / "student", model))
        for checkpoint, quantization, limit in (
            (model, "FP32", 1e-5),
            (student, "FP32", 1e-5),
            (student, "8DA4W", 0.1),
        ):
            named = checkpoint.name if checkpoint == model or arguments.student else "a random student"
            name = f"{named}: {quantization}"
            made, size, seconds = exported(
                checkpoint, Path(scratch) / f"{checkpoint.name}-{quantization}", quantization
            )
            parity = made.parity
            assert parity is not None
            figures[name] = {
                "parameters": made.parameters,
                "program_bytes": size,
                "relative_rms": parity.relative_rms,
                "max_abs_difference": parity.max_abs_difference,
                "export_seconds": seconds,
                "tool_versions": made.tool_versions,
                "notes": made.notes,
            }
            rows.append((name, f"{made.parameters:,}", f"{size:,}", f"{parity.relative_rms:.2g}", f"{seconds:.0f}"))
            bounds.append(Bound(f"{name}: error of the logits over their spread", parity.relative_rms, "<=", limit))
        try:
            exported(model, Path(scratch) / "refused", "8DA4W")
            refused = ""
        except UserError as error:
            refused = error.cause.replace(str(model), model.name)
    figures["refused"] = {f"{model.name}: 8DA4W": refused}
    bounds.append(Bound(f"{model.name}: 8DA4W is refused for its widths", float("172 columns" in refused), ">=", 1.0))
    finish(
        "executorch_export",
        arguments,
        figures=figures,
        header=("model", "parameters", "bytes", "error / spread", "export, s"),
        rows=rows,
        bounds=bounds,
        notes=["seconds hold the start of ExecuTorch's interpreter; the machine was shared", f"refused: {refused}"],
    )


if __name__ == "__main__":
    main()
