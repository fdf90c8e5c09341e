"""How an encoder's token vectors become one embedding, as sentence-transformers' files beside the model say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedistill.errors import UserError
from edgedistill.strict import read_json, read_json_value

MEAN, CLS, LAST = 1, 2, 3  # llama.cpp's numbers
NAMES = {MEAN: "mean", CLS: "cls", LAST: "last token"}
MODES = {"pooling_mode_mean_tokens": MEAN, "pooling_mode_cls_token": CLS, "pooling_mode_lasttoken": LAST}
MODE_NAMES = {"mean": MEAN, "cls": CLS, "lasttoken": LAST}
WITHOUT_WEIGHTS = ("Transformer", "Pooling", "Normalize")


def pooling_of(checkpoint: Path) -> tuple[int, list[str]]:
    """llama.cpp's pooling type, and notes. Without 1_Pooling/config.json it is the mean of the token vectors.

    Raises UserError for a pooling that llama.cpp lacks, and for further layers (Dense, ...) behind it.
    """
    notes = _modules(checkpoint)
    path = checkpoint / "1_Pooling" / "config.json"
    if not path.is_file():
        return MEAN, [*notes, "no 1_Pooling/config.json beside the model: token vectors are averaged (mean pooling)"]
    config = read_json(path, what="the pooling's config.json")
    written: Any = config.get("pooling_mode")
    chosen = [written] if isinstance(written, str) else []
    chosen += [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    known = {**MODES, **MODE_NAMES}
    if len(chosen) != 1 or chosen[0] not in known:
        raise UserError(
            f"{path}: the pooling is {' and '.join(chosen) or 'none'}, which llama.cpp cannot do",
            f"models with one of {', '.join(MODES)} work",
        )
    if config.get("include_prompt") is False:
        notes.append("sentence-transformers leaves the prompt's tokens out of the pooling; llama.cpp does not")
    return known[chosen[0]], notes


def _modules(checkpoint: Path) -> list[str]:
    path = checkpoint / "modules.json"
    if not path.is_file():
        return []
    try:
        modules = read_json_value(path, what="modules.json")
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {error}", "replace it with the model's own modules.json") from error
    further = [kind for kind in kinds if kind not in WITHOUT_WEIGHTS]
    if further:
        raise UserError(
            f"{path}: a {further[0]} layer follows the pooling, which llama.cpp cannot run",
            f"models with {', '.join(WITHOUT_WEIGHTS)} alone work",
        )
    if "Normalize" in kinds:
        return ["the original scales embeddings to length 1: ask the runtime to normalize them (llama.cpp: 2-norm)"]
    return []
