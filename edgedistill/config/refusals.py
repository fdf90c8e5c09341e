"""Recipes that ask for what cannot go together, refused before any work."""

from __future__ import annotations

from collections.abc import Iterable

from edgedistill.config.recipe import Recipe
from edgedistill.errors import UserError
from edgedistill.quantization.mixes import MIXES_THAT_NEED_IMPORTANCE


def refuse_mixture(recipe: Recipe, *, caching: bool) -> None:
    """Refuse what several teachers at once cannot give; `caching`: their signals are to lie on disk. UserError."""
    if not recipe.teacher.also:
        return
    cache = recipe.distill.cache
    several = f"teacher.also names {len(recipe.teacher.also)} further teacher(s)"
    if recipe.teacher.model is None:
        raise UserError(
            f"{several}, and the first one would be trained here with a tokenizer of its own",
            "name a first teacher with their tokenizer: --teacher FOLDER",
        )
    if not caching:
        return
    if cache.kind == "hidden":
        raise UserError(
            f"{several}, and distill.cache.kind is hidden: their states cannot be mixed, only their probabilities",
            "set distill.cache.kind to sampled or dense, or distill.teacher_signals=live",
        )
    if cache.hidden_layers or cache.attention_layers:
        raise UserError(
            f"{several}, and distill.cache keeps layers {[*cache.hidden_layers, *cache.attention_layers]} of one",
            "leave distill.cache.hidden_layers and attention_layers empty",
        )
    if cache.kind == "dense" and recipe.distill.temperature != 1.0:
        raise UserError(
            f"{several}, and distill.temperature is {recipe.distill.temperature:g}: a dense cache keeps the mean of"
            " their probabilities at 1, which does not tell the mean at another temperature",
            "set distill.cache.kind=sampled, distill.temperature=1, or distill.teacher_signals=live",
        )


def refuse_trimming(recipe: Recipe) -> None:
    """Refuse to trim a vocabulary where the student would not be the teacher's with fewer tokens. UserError."""
    student = recipe.student
    if not student.trim_vocabulary:
        return
    if recipe.teacher.model is None:
        raise UserError(
            "student.trim_vocabulary is true, and the teacher is trained here: its tokens are made from this very text",
            "set student.trim_vocabulary=false, or teacher.train.vocab_size to fewer tokens",
        )
    if student.start == "pretrained":
        raise UserError(
            "student.trim_vocabulary is true, and student.start is pretrained: that student keeps its own tokens",
            "set student.trim_vocabulary=false, or start from the teacher: student.start=layers, width or both",
        )


def refuse_rounding(recipe: Recipe, artifacts: Iterable[tuple[str, str]]) -> None:
    """Refuse to train under a rounding that is not imitated here. UserError."""
    if recipe.distill.qad.tokens_share == 0:
        return
    for format_, quantization in artifacts:
        if format_ not in ("gguf", "onnx"):
            raise UserError(
                f"distill.qad.tokens_share is {recipe.distill.qad.tokens_share:g}, and the rounding of"
                f" {format_}:{quantization} is not imitated in training",
                "set distill.qad.tokens_share=0, or choose a gguf or onnx artifact",
            )


def refuse_importance(recipe: Recipe, artifacts: Iterable[tuple[str, str]]) -> None:
    """Refuse (format, quantization) that llama.cpp writes only with an importance matrix, where none is to be made."""
    if recipe.export.importance_matrix != "off":
        return
    for format_, quantization in artifacts:
        if format_ == "gguf" and quantization in MIXES_THAT_NEED_IMPORTANCE:
            raise UserError(
                f"export.importance_matrix is off, and llama.cpp writes {quantization} only with an importance matrix",
                "set it to auto, or choose IQ3_S, Q3_K_M or a larger quantization",
            )


def refuse_mixed(recipe: Recipe, artifacts: Iterable[tuple[str, str]]) -> None:
    """Refuse to search for a mix of types where a format has none, or where training is to learn the rounding of one
    that is not chosen yet. UserError.
    """
    if recipe.export.mixed_retention is None:
        return
    for format_, quantization in artifacts:
        refuse_mixed_format(format_, quantization)
    if recipe.distill.qad.tokens_share > 0:
        raise UserError(
            "distill.qad.tokens_share and export.mixed_retention are both set: the mix would be chosen again after"
            " training under it",
            "name the mix with export.tensor_types, or set distill.qad.tokens_share=0",
        )


def refuse_mixed_format(format_: str, quantization: str, *, decoder: bool = True) -> None:
    """UserError for a format in which types are not searched for layer by layer: ONNX decoders are such."""
    if format_ != "gguf" and (format_ != "onnx" or decoder):
        raise UserError(
            f"export.mixed_retention is set, and {format_}:{quantization} of a decoder is not a GGUF: only there are"
            " types chosen layer by layer",
            "export as GGUF, or leave export.mixed_retention out",
        )


def refuse_no_text(recipe: Recipe) -> None:
    """A model of the user's is not distilled on the quickstart's text because nobody named another. UserError."""
    role = "teacher" if recipe.teacher.model else "student" if recipe.student.model else ""
    if role and "source" not in recipe.data.model_fields_set:
        raise UserError(
            f"a {role} is named, and no text to distil on",
            "--data with a file, a folder or a hub id of text like that the model will meet (data.source in a recipe);"
            " --data python-docs takes Python's documentation, to try it",
        )
