"""Stop tokens, search settings and chat templates of an onnxruntime-genai folder, as the model's own files have them.

The builder takes some of generation_config.json into genai_config.json and leaves the rest at its own defaults.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedistill.models.generation import DEFAULT_TEMPLATE, TEMPLATE_FILE, Generation, chat_templates
from edgedistill.runtimes.ort import CONFIG, genai_config

# transformers' name and onnxruntime-genai's are one; what is not here is noted. `max_length` is the context there.
CARRIED: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "min_length": 0,
}
FIXED: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "diversity_penalty": 0.0}


def search_settings(settings: Mapping[str, Any], context_tokens: int) -> dict[str, Any]:
    """What `search` of genai_config.json says, of settings as generation.py gives them."""
    return {**{k: settings.get(k, usual) for k, usual in CARRIED.items()}, **FIXED, "max_length": context_tokens}


def eos_setting(stops: tuple[int, ...]) -> int | list[int]:
    """`eos_token_id`: one number, or the list of several."""
    return stops[0] if len(stops) == 1 else list(stops)


def write_generation(folder: Path, generation: Generation, context_tokens: int) -> list[str]:
    """Put them into a folder that the builder wrote; notes of what genai_config.json has no place for."""
    config = genai_config(folder)
    if generation.stops:
        config["model"]["eos_token_id"] = eos_setting(generation.stops)
    config["search"] |= search_settings(generation.settings, context_tokens)
    (folder / CONFIG).write_text(json.dumps(config, indent=4), encoding="utf-8")
    if generation.template:
        # transformers saves it anew; what ships is the original, to the byte.
        (folder / TEMPLATE_FILE).write_bytes(generation.template.encode("utf-8"))
    left = {key: value for key, value in generation.settings.items() if key not in CARRIED}
    said = ", ".join(f"{key} {str(value)[:40]}" for key, value in left.items())
    unsaid = [f"generation_config.json's {said}: not in genai_config.json, and the app must set it"] if left else []
    named = [name for name in generation.templates if name != DEFAULT_TEMPLATE and name not in chat_templates(folder)]
    behind = [f"the chat templates {', '.join(named)} stay behind: the folder holds the default one"] if named else []
    return [*generation.notes, *unsaid, *behind]
