"""Low-rank adapters on a frozen student (Hu et al. 2021; NF4 base: Dettmers et al. 2023), merged before export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch  # noqa: TID253  this module is imported by training alone
from torch import Tensor, nn  # noqa: TID253

from edgedistill.config.recipe import Lora
from edgedistill.errors import UserError
from edgedistill.models.bitsandbytes import load_quantized
from edgedistill.training.checkpoint import whole


def add_adapters(
    model: nn.Module, ask: Lora, *, folder: Path, device: torch.device, seed: int, sharded: bool = False
) -> nn.Module:
    """The student with trainable adapters and everything else frozen.

    With a quantized base the start is written to `folder` and read back as bitsandbytes' INT8 or NF4.
    Raises UserError where peft is missing, no linear layer bears a name of `targets`, or a quantized base is to be
    sharded.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(
            f"distill.lora.rank is {ask.rank}, and peft is not installed",
            "pip install 'edgedistill[train]', or set distill.lora.rank=0",
        ) from error
    from transformers.pytorch_utils import Conv1D

    names = sorted({name.rpartition(".")[2] for name, _ in linear_layers(model)})
    unknown = [target for target in ask.targets if target not in names]
    if unknown:
        raise UserError(f"distill.lora.targets names {', '.join(unknown)}", f"this student has {', '.join(names)}")
    if ask.base != "fp32" and sharded:
        raise UserError(
            f"distill.lora.base is {ask.base}, whose layers FSDP cannot shard",
            "set distill.lora.base=fp32, or train without --use_fsdp",
        )
    if ask.base != "fp32":
        model.save_pretrained(folder)  # type: ignore[operator]
        model = load_quantized(folder, ask.base, device, frozen=False)
    model.requires_grad_(False)
    config = LoraConfig(
        r=ask.rank,
        lora_alpha=ask.alpha,
        lora_dropout=ask.dropout,
        # full names: a bare one would match the output head too, where that bears the name of a layer
        target_modules=[
            name for name, _ in linear_layers(model) if not ask.targets or name.rpartition(".")[2] in ask.targets
        ],
        # GPT-2's weights lie the other way round
        fan_in_fan_out=any(isinstance(module, Conv1D) for _, module in linear_layers(model)),
    )
    torch.manual_seed(seed)
    adapted: nn.Module = inject_adapter_in_model(config, model)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return adapted


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the linear layers an adapter can sit on: all but the output head."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    from transformers.pytorch_utils import Conv1D

    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


@torch.no_grad()
def merge_adapters(model: nn.Module, start: nn.Module) -> nn.Module:
    """A plain fp32 student: frozen weights as training saw them (dequantized) plus alpha/rank · B A.

    `start` is a model of the same shape without adapters; its weights are overwritten and it is returned. A sharded
    student is gathered: all ranks call it.
    """
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    adapted: dict[str, Any] = dict(model.named_modules())
    for name, module in start.named_modules():
        if not name:
            continue
        twin = adapted[name]
        delta = None
        if isinstance(twin, LoraLayer):
            up, down = (whole(part["default"].weight).float() for part in (twin.lora_B, twin.lora_A))
            delta = twin.scaling["default"] * (up @ down)  # [out, in]
            twin = twin.get_base_layer()
        for leaf, parameter in module.named_parameters(recurse=False):
            value = _plain_weight(twin) if leaf == "weight" else whole(getattr(twin, leaf).detach()).float()
            if leaf == "weight" and isinstance(module, Conv1D) and not isinstance(twin, Conv1D):
                value = value.T  # a quantized layer is [out, in] whatever it was made of
            if leaf == "weight" and delta is not None:
                value = value + (delta.T if isinstance(module, Conv1D) else delta)
            if value.shape != parameter.shape:
                raise ValueError(f"{name}.{leaf}: {tuple(value.shape)} for {tuple(parameter.shape)}")
            parameter.copy_(value.to(parameter.device))
    return start


def _plain_weight(module: Any) -> Tensor:
    weight = module.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        import bitsandbytes.functional as functional

        return functional.dequantize_4bit(weight.data, weight.quant_state).float().cpu()  # type: ignore[no-any-return]
    if kind == "Int8Params":
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        data = weight.data if weight.CB is None else weight.CB
        return (data.float() * (scales.float().unsqueeze(1) / 127.0)).cpu()  # type: ignore[no-any-return]
    return whole(weight.detach()).float()
