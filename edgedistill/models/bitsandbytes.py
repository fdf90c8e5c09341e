"""bitsandbytes' INT8 and NF4 layers in torch: a model folder loaded into them, and a folder of them opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedistill.errors import UserError
from edgedistill.models.loading import LOADING

BLOCK_4BIT = 64  # weights that share a scale
TILE_ROWS_4BIT = 32  # of the layout for CPUs with bf16 instructions


def load_quantized(folder: Path, precision: str, device: Any, *, frozen: bool = True) -> Any:
    """A model folder with bitsandbytes' INT8 or NF4 linear layers, on `device`; the output head stays as it is.

    `frozen`: nothing will be trained through it. Raises UserError where bitsandbytes is missing, or does not compute
    such a model rightly.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        import bitsandbytes
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise UserError(
            f"{precision} weights need bitsandbytes, which is not installed", "pip install 'edgedistill[train]'"
        ) from error
    quantization = (
        BitsAndBytesConfig(load_in_8bit=True)
        if precision == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": str(device)}, **LOADING
    )
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and device.type == "cpu":
            check_4bit_on_cpu(name, module, frozen=frozen)
    return model


def check_4bit_on_cpu(name: str, layer: Any, *, frozen: bool) -> None:
    """What bitsandbytes' 4-bit layers need on a CPU (0.50.2). Raises UserError.

    Dequantizing is wrong there where a row is not whole blocks. The kernel of CPUs with bf16 instructions rearranges
    the weights at the first pass in eval: it wants whole tiles, rounds the scales to bf16 for good, and gives no
    gradient, so a base that adapters are trained on would change under them at the first evaluation.
    """
    if layer.in_features % BLOCK_4BIT:
        raise UserError(
            f"{name} takes {layer.in_features} inputs, and bitsandbytes' 4-bit layers on a CPU need a multiple of"
            f" {BLOCK_4BIT}",
            "use int8 or fp32, or a GPU",
        )
    if not frozen or layer.out_features % TILE_ROWS_4BIT:
        layer.support_avx512bf16_for_cpu = False


def open_folder(folder: Path) -> Any:
    """The model of an exported folder in eval, on the GPU where there is one."""
    import bitsandbytes
    import torch
    from transformers import AutoModelForCausalLM

    from edgedistill.models.device import training_device

    device = training_device()
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": str(device)}, **LOADING
    )
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and device.type == "cpu":
            check_4bit_on_cpu(name, module, frozen=True)
    return model.eval()
