"""What turns raw input into a model's: its tokenizer or image processor, opened as transformers opens them.

Everything that a graph is compared and calibrated on comes through the folder that ships, so that a file that is
missing there, or says something else, is found before anything says success.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.errors import UserError
from edgedistill.models.companions import PROCESSOR_NAMES, TOKENIZER_NAMES, companions
from edgedistill.models.hf_tokenizer import read_whole
from edgedistill.strict import read_json

TOKENIZER_CONFIG = "tokenizer_config.json"
REMEDY = "save the tokenizer that the model was trained with into the folder"
# Sizes, width and height, of what an image processor is tried on: upright, flat, square and neither of 2's multiples.
SIZES = ((64, 96), (97, 61), (80, 80))


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_NAMES)


def open_tokenizer(folder: Path) -> Any | None:
    """The folder's tokenizer; None where it has none. UserError where what is there cannot be opened."""
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        return None
    try:
        return read_whole(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except ImportError as error:
        # It is Python code with a library of its own, and the graph needs none of it.
        if not (folder / "tokenizer.json").is_file():
            return None
        raise _unopened(folder, "tokenizer", error) from error
    except Exception as error:  # whatever a damaged file leads to
        if not (folder / "tokenizer.json").is_file() and not (folder / TOKENIZER_CONFIG).is_file():
            return None  # names that are no tokenizer's: vocab.json of something else
        raise _unopened(folder, "tokenizer", error) from error


def open_image_processor(folder: Path) -> Any | None:
    """The folder's image processor; None where it has none. UserError where what is there cannot be opened."""
    from transformers import AutoImageProcessor

    if not any((folder / name).is_file() for name in PROCESSOR_NAMES):
        return None
    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise _unopened(folder, "image processor", error) from error


def read(tokenizer: Any, *texts: Any, where: Path, **options: Any) -> Any:
    """What the tokenizer gives. UserError where it does not take text, but tables, or words with their boxes."""
    try:
        return tokenizer(*texts, **options)
    except Exception as error:  # each class has its own way to say so
        raise _unopened(where, "tokenizer", error) from error


def given_names(tokenizer: Any, where: Path) -> list[str]:
    """The inputs that it gives for a text: those that it names, and those beside them (RoCBert's shapes of words)."""
    try:
        made = read(tokenizer, "a", where=where)
    except UserError:  # of tables, or words with boxes: what it names says which, before its first text says so again
        return list(tokenizer.model_input_names)
    several = [name for name, value in made.items() if isinstance(value, list) and value and type(value[0]) is int]
    return list(dict.fromkeys([*tokenizer.model_input_names, *several]))


def tokenized(
    tokenizer: Any, texts: Sequence[Any], names: Collection[str], *, max_tokens: int, where: Path
) -> dict[str, NDArray[Any]]:
    """Texts, or pairs of them, as one batch, padded to its longest as the tokenizer pads. UserError."""
    if tokenizer.pad_token is None and len(texts) > 1:
        raise UserError(f"{where}: its tokenizer has no padding token", "set pad_token in tokenizer_config.json")
    sides = [list(side) for side in zip(*texts, strict=True)] if isinstance(texts[0], tuple) else [list(texts)]
    made = read(
        tokenizer, *sides, where=where, padding=len(texts) > 1, truncation=True, max_length=max_tokens,
        return_tensors="np",
    )  # fmt: skip
    missing = set(names) - set(made)
    if missing:
        raise UserError(f"{where}: its tokenizer does not give {', '.join(sorted(missing))}", REMEDY)
    return {name: np.asarray(made[name], dtype=np.int64) for name in names}


def pixels(processor: Any, images: Sequence[NDArray[np.uint8]], where: Path) -> dict[str, NDArray[Any]]:
    """Images [H, W, 3], or gray ones of one channel, as the processor gives them, by name. UserError."""
    from PIL import Image

    try:
        shown = [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in images]
        made = processor(shown, return_tensors="np")
    except Exception as error:  # of another version's settings, or sizes that cannot be stacked
        raise _unopened(where, "image processor", error) from error
    return {name: np.asarray(value) for name, value in made.items()}


def processed_sizes(processor: Any, where: Path, *, channels: int = 3) -> tuple[set[str], set[tuple[int, ...]]]:
    """What the processor gives of images of several sizes: the names, and the shapes [C, H, W] of its pixels."""
    names: set[str] = set()
    shapes = set()
    for width, height in SIZES:
        made = pixels(processor, [np.zeros((height, width, channels), dtype=np.uint8)], where)
        if "pixel_values" not in made or made["pixel_values"].ndim != 4:
            raise UserError(
                f"{where}: its image processor gives {sorted(made)}, and no images of [channels, height, width]",
                "export the torch module itself: edgedistill.onnx.encoder.export_module takes any",
            )
        names |= set(made)
        shapes.add(tuple(int(size) for size in made["pixel_values"].shape[1:]))
    return names, shapes


def ship(folders: Sequence[Path], built: Path, *, tokenizer: Any | None, max_tokens: int) -> None:
    """Copy what tokenizer, processors and settings load from; a name in an earlier of `folders` hides later ones.

    The tokenizer that ships cuts at `max_tokens`, what the graph is promised for, where it would cut later or never.
    """
    further = (getattr(tokenizer, "vocab_files_names", None) or {}).values()
    for folder in reversed(folders):
        for path in companions(folder, further):
            shutil.copyfile(path, built / path.name)
    if tokenizer is not None and max_tokens and tokenizer.model_max_length > max_tokens:
        path = built / TOKENIZER_CONFIG
        config = read_json(path, what=TOKENIZER_CONFIG) if path.is_file() else {}
        config["model_max_length"] = max_tokens
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def require_same_tokens(original: Any, shipped: Any | None, texts: Sequence[str], where: Path) -> None:
    """UserError where the tokenizer that ships reads a text otherwise than the one that the folder has."""
    if original is None:
        return
    if shipped is None:
        raise UserError(
            f"{where}: its tokenizer cannot be opened from what ships", "report this with the folder's file names"
        )
    for text in texts:
        expected, found = (read(tokenizer, text, where=where)["input_ids"] for tokenizer in (original, shipped))
        if expected != found:
            raise UserError(
                f"{where}: the tokenizer that ships reads {text[:60]!r} as {found[:12]}, the model's as"
                f" {expected[:12]}",
                "report this with the folder's file names",
            )


def _unopened(folder: Path, what: str, error: Exception) -> UserError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(lines)[:300] or type(error).__name__
    return UserError(f"{folder}: its {what} cannot be used: {reason}", f"save its {what} again with save_pretrained")
