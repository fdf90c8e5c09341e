"""DeepSpeed's ZeRO (Rajbhandari et al. 2020), as accelerate's configuration asks for it.

Stage 2 shards gradients and optimizer state, stage 3 the weights too. The engine exchanges, clips and steps; what is
trained, at which rate, in which precision and from which checkpoint stays edgedistill's own, so that checkpoints are
those of every other mode: whole tensors by parameter name.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch  # noqa: TID253  this module is imported by training alone
from torch import Tensor, nn  # noqa: TID253

from edgedistill.config.recipe import Training
from edgedistill.errors import UserError
from edgedistill.strict import read_json

MOMENTS = ("exp_avg", "exp_avg_sq")
NOT_OURS_TO_GIVE = ("optimizer", "scheduler", "fp16", "bf16", "amp")


def configuration(settings: Training, *, micro_batch: int) -> dict[str, Any]:
    """DeepSpeed's configuration: accelerate's file or flags for ZeRO, the recipe for all else.

    Raises UserError for a stage other than 1 to 3, and for what a file sets that the recipe decides.
    """
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        given = read_json(Path(file), what="DeepSpeed configuration")
        for name in NOT_OURS_TO_GIVE:
            section = given.get(name)
            if section and not (isinstance(section, dict) and section.get("enabled", name) in (False, "auto")):
                raise UserError(
                    f"{file} sets {name}, which the recipe decides (distill.optimizer, distill.precision)",
                    f"take {name} out of that file",
                )
        ask = dict(given.get("zero_optimization", {}))
    else:
        ask = {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
        for part in ("optimizer", "param"):
            device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
            if device != "none":
                ask[f"offload_{part}"] = {"device": device}
    if ask.get("stage") not in (1, 2, 3):
        raise UserError(
            f"DeepSpeed is asked for with ZeRO stage {ask.get('stage')}",
            "ask for stage 1, 2 or 3: accelerate launch --use_deepspeed --zero_stage 2 -m edgedistill ...",
        )
    return {
        "zero_optimization": {name: value for name, value in ask.items() if value != "auto"},
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,  # the trainer says which micro-batch is the last
        "gradient_clipping": settings.clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 40,
    }


def load_deepspeed() -> Any:
    """The library, its news on standard error and warnings alone: standard output is for results. UserError."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import deepspeed
    except ImportError as error:
        raise UserError(
            f"accelerate's configuration asks for DeepSpeed, which cannot be imported: {error}",
            "pip install deepspeed, or shard with FSDP2: accelerate launch --use_fsdp --fsdp_version 2",
        ) from error
    deepspeed.utils.logger.setLevel("WARNING")
    return deepspeed


def start_engine(module: nn.Module, optimizers: list[torch.optim.Optimizer], settings: Training, micro: int) -> Any:
    """The engine around the loss module; `engine.optimizer` takes the optimizer's place. UserError."""
    if settings.optimizer != "adamw":
        raise UserError(
            f"distill.optimizer is {settings.optimizer}, and DeepSpeed trains with adamw here",
            "set distill.optimizer=adamw, or shard with FSDP2: accelerate launch --use_fsdp --fsdp_version 2",
        )
    if any(not parameter.requires_grad for parameter in module.parameters()):
        raise UserError(
            "DeepSpeed is asked for, and this student has frozen weights (distill.lora)",
            "train adapters with torchrun, or with FSDP2: accelerate launch --use_fsdp --fsdp_version 2",
        )
    deepspeed = load_deepspeed()
    ours = configuration(settings, micro_batch=micro)
    with contextlib.redirect_stdout(sys.stderr):
        engine, optimizer, _, _ = deepspeed.initialize(model=module, optimizer=optimizers[0], config=ours)
    for group, before in zip(optimizer.param_groups, optimizers[0].param_groups, strict=True):
        group.setdefault("peak", before["lr"])
    return engine


def is_engine(module: nn.Module) -> bool:
    return type(module).__name__ == "DeepSpeedEngine"


def is_zero(optimizer: Any) -> bool:
    return type(optimizer).__name__.startswith("DeepSpeedZeroOptimizer")


def discard_gradients(engine: Any) -> None:
    """Forget a batch's gradients without a step, as the engine itself does where they are not finite."""
    optimizer = engine.optimizer
    optimizer.zero_grad(set_to_none=True)
    if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
        optimizer.reset_cpu_buffers()
    else:
        optimizer.averaged_gradients = {}


def is_parted(tensor: Any) -> bool:
    """Whether ZeRO-3 keeps this parameter in parts."""
    return hasattr(tensor, "ds_id")


def is_kept_twice(parameter: Any) -> bool:
    """Whether the optimizer has a copy of its own of this parameter."""
    return is_parted(parameter) or hasattr(parameter, "_hp_mapping")


def gathered(parameter: Any) -> Tensor:
    """The whole of a parameter of ZeRO-3 (a collective)."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()  # type: ignore[no-any-return]


def fill_parameter(parameter: Any, value: Tensor) -> None:
    """Put a whole tensor into a parameter and into the optimizer's copy of it (a collective)."""
    import deepspeed

    value = value.to(parameter.device)
    if is_parted(parameter):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
    else:
        parameter.copy_(value)
    deepspeed.utils.safe_set_full_fp32_param(parameter, value)


def _link(optimizer: Any) -> None:
    """Let stages 1 and 2 find every parameter's state.

    DeepSpeed (0.19.8) links them once, after the first group's first step, when the other groups have none yet.
    """
    link = getattr(optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        optimizer._hp_optimizer_states_linked = False
        link()


def optimizer_state(optimizer: Any, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """AdamW's state as "0|parameter|entry" → whole tensor on the CPU (a collective)."""
    import deepspeed

    if not optimizer.optimizer.state:
        return {}  # no step was made yet
    _link(optimizer)
    inner = next(iter(optimizer.optimizer.state.values()))
    state = {}
    for name, parameter in named.items():
        for entry in MOMENTS:
            whole: Any = deepspeed.utils.safe_get_full_optimizer_state(parameter, entry)
            state[f"0|{name}|{entry}"] = whole.detach().cpu().clone().contiguous()
        state[f"0|{name}|step"] = torch.as_tensor(inner["step"]).detach().cpu().float().clone()
    return state


def fill_optimizer(optimizer: Any, named: Mapping[str, Tensor], stored: Mapping[str, Any]) -> None:
    """Put AdamW's state, by name, into the parts that the ranks keep (a collective)."""
    import deepspeed

    steps = [float(value) for key, value in stored.items() if key.endswith("|step")]
    if not steps:
        return
    # this rank's part of each group, by the names of stage 3 and of stages 1 and 2; AdamW makes its state at a step
    flats = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    for flat in optimizer.single_partition_of_fp32_groups if flats is None else flats:
        moments = {entry: torch.zeros_like(flat) for entry in MOMENTS}
        optimizer.optimizer.state[flat] = {"step": torch.tensor(steps[0]), **moments}
    _link(optimizer)
    for name, parameter in named.items():
        for entry in MOMENTS:
            value = stored[f"0|{name}|{entry}"].to(parameter.device)
            deepspeed.utils.safe_set_full_optimizer_state(parameter, value, entry)
