"""The student's start: designed and fresh, from a pretrained folder, or cut from the teacher's layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.errors import UserError
from edgedistill.models import ModelFolder, check_folder
from edgedistill.records import Shape
from edgedistill.shapes import config_from_shape

if TYPE_CHECKING:
    from torch import nn


def uniform_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """Numbers of the teacher's layers that a student takes: evenly spread, first and last kept.

    Jiao et al. 2020 (TinyBERT): the uniform map beats taking the top or the bottom layers.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise UserError(
            f"a student of {student_layers} layers cannot be cut from a teacher of {teacher_layers}",
            f"set student.shape.num_hidden_layers to 1…{teacher_layers}",
        )
    if student_layers == 1:
        return [0]
    return [round(i * (teacher_layers - 1) / (student_layers - 1)) for i in range(student_layers)]


def require_cuttable(teacher: Shape, student: Shape) -> None:
    """A student cut from layers has all the teacher's sizes but depth; UserError naming the first other one."""
    for name in type(teacher).model_fields:
        ours, theirs = getattr(teacher, name), getattr(student, name)
        if ours != theirs and name not in ("num_hidden_layers", "max_position_embeddings"):
            raise UserError(
                f"student.start is layers, but its {name} is {theirs} and the teacher's {ours}",
                "cutting layers keeps the teacher's widths: set only student.shape.num_hidden_layers, or start fresh",
            )


def start_student(
    start: str,
    shape: Shape,
    *,
    teacher: Path,
    pretrained: ModelFolder | None,
    seed: int,
    rope_theta: float | None = None,
) -> nn.Module:
    """The student before training, fp32, as a transformers model.

    `teacher` is the teacher's folder (its rotary base, norms and special tokens are kept); `pretrained`
    the student's own where start is "pretrained".
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model: Any
    if start == "pretrained":
        if pretrained is None:
            raise UserError("student.start is pretrained but no student.model is named", "give --student FOLDER")
        model = AutoModelForCausalLM.from_pretrained(pretrained.path, dtype=torch.float32, use_safetensors=True)
        return model  # type: ignore[no-any-return]
    source = check_folder(teacher, name=str(teacher), origin="folder", role="teacher")
    if start == "layers":
        require_cuttable(source.shape, shape)
        original = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32, use_safetensors=True)
        config = AutoConfig.from_pretrained(teacher)
        config.num_hidden_layers = shape.num_hidden_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: shape.num_hidden_layers]
        model = AutoModelForCausalLM.from_config(config).float()
        model.load_state_dict(_cut(original.state_dict(), source.shape.num_hidden_layers, shape.num_hidden_layers))
        return model  # type: ignore[no-any-return]
    rope = source.config.get("rope_parameters") or {}
    base = rope.get("rope_theta") or source.config.get("rope_theta") or 10000.0
    config_dict = config_from_shape(
        shape,
        bos_token_id=source.config.get("bos_token_id"),
        eos_token_id=source.config.get("eos_token_id"),
        pad_token_id=source.config.get("pad_token_id"),
        rms_norm_eps=source.config.get("rms_norm_eps", 1e-6),
        rope_theta=float(base),
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_dict)).float()
    return model  # type: ignore[no-any-return]


def _cut(state: dict[str, Any], teacher_layers: int, student_layers: int) -> dict[str, Any]:
    place = {old: new for new, old in enumerate(uniform_layers(teacher_layers, student_layers))}
    cut = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            number = int(parts[2])
            if number not in place:
                continue
            parts[2] = str(place[number])
        cut[".".join(parts)] = tensor
    return cut
