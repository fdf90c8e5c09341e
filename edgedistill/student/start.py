"""The student's start: designed and fresh, from a pretrained folder, or cut out of the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.config.recipe import Student
from edgedistill.errors import UserError
from edgedistill.models.folder import ModelFolder, check_folder
from edgedistill.models.loading import LOADING
from edgedistill.models.shapes import config_from_shape, config_of_student
from edgedistill.records.shape import Shape
from edgedistill.strict import read_json

if TYPE_CHECKING:
    from torch import Tensor, nn


def start_student(
    ask: Student,
    shape: Shape,
    *,
    teacher: Path,
    pretrained: ModelFolder | None,
    seed: int,
    sample: Tensor | None = None,
    trimmed: Path | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The student before training, fp32, as a transformers model, and what of the teacher it kept.

    `teacher` is the teacher's folder (a fresh student keeps its rotary base, norms and special tokens); `pretrained`
    the student's own where ask.start is "pretrained"; `sample` [S, T] ids on which importance is measured. `trimmed` is
    the folder of the trimmed tokenizer, whose tokens the shape and the sample then have.
    Raises UserError where the start does not fit the shape.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model: Any
    if ask.start == "pretrained":
        if pretrained is None:
            raise UserError("student.start is pretrained but no student.model is named", "give --student FOLDER")
        return AutoModelForCausalLM.from_pretrained(pretrained.path, dtype=torch.float32, **LOADING), {}
    source = check_folder(teacher, name=str(teacher), origin="folder", role="teacher")
    if ask.start == "auto":
        raise UserError("student.start is auto, which only a plan resolves", "set it to one of the other starts")
    if ask.start != "fresh":
        return _cut(ask, shape, source, teacher, sample, trimmed)
    special = source.config if trimmed is None else read_json(trimmed / "config.json", what="config.json")
    if shape.layer_tensors:
        config = AutoConfig.for_model(**config_of_student(source.config, shape, special))
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).float(), {}
    rope = source.config.get("rope_parameters") or {}
    base = rope.get("rope_theta") or source.config.get("rope_theta") or 10000.0
    config_dict = config_from_shape(
        shape,
        bos_token_id=special.get("bos_token_id"),
        eos_token_id=special.get("eos_token_id"),
        pad_token_id=special.get("pad_token_id"),
        rms_norm_eps=source.config.get("rms_norm_eps", 1e-6),
        rope_theta=float(base),
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_dict)).float()
    return model, {}


def _cut(
    ask: Student, shape: Shape, source: ModelFolder, teacher: Path, sample: Tensor | None, trimmed: Path | None
) -> tuple[nn.Module, dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    from edgedistill.student.axes import Sizes
    from edgedistill.student.prune import cut

    if shape.tie_word_embeddings != source.shape.tie_word_embeddings:
        raise UserError(
            f"student.start is {ask.start}, and no student with the teacher's separate output head fits",
            "lower student.compression, or use student.start=fresh, which may tie it to the embedding",
        )
    original = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32, **LOADING).eval()
    if trimmed is not None:
        from edgedistill.student.vocabulary import trim_rows

        trim_rows(original, trimmed, teacher)
    wanted = Sizes(
        hidden=shape.hidden_size,
        ffn=shape.intermediate_size,
        layers=shape.num_hidden_layers,
        heads=shape.num_attention_heads,
        kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        vocab=shape.vocab_size,
    )
    return cut(original, wanted, layer_choice=ask.layer_choice, sample=sample)
