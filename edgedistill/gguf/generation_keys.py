"""Stop tokens, chat templates and sampling settings as a GGUF says them.

llama.cpp ends a text at the tokens of the keys eos, eot and eom, and at tokens whose text it knows, whatever the keys
say. Sampling settings are the keys `general.sampling.*`, which llama.cpp's programs start from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgedistill.errors import UserError
from edgedistill.gguf.tokenizer_files import GgufTokenizer
from edgedistill.models.generation import DEFAULT_TEMPLATE, Generation

STOP_ROLES = ("eos", "eot", "eom")
# Tokens that end a text in llama.cpp by what they are called, in every vocabulary that has them.
STOPS_BY_TEXT = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
        "<turn|>", "<|tool_response>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
        "<\uff5cend\u2581of\u2581sentence\uff5c>", "<end_of_utterance>", "<eos>", "<|end_of_text|>",
    }
)  # fmt: skip
# Tokens of a code model's gaps, which end a text there too.
GAPS_BY_TEXT = frozenset(
    {
        "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>",
        "<REPO>", "<reponame>", "<|file_sep|>", "<|plamo:file_separator|>", "<|plamo:reponame|>",
    }
)  # fmt: skip
# What llama.cpp takes for eos where a GGUF has no such key: a word like any other.
DEFAULT_EOS = {"gpt2": 11, "llama": 2, "t5": 1}
SAMPLING = "general.sampling."
SETTING_OF = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
}  # fmt: skip
WHOLE_CONTEXT = -1  # how far back transformers' repetition penalty looks


def with_generation(tokenizer: GgufTokenizer, generation: Generation, *, where: str) -> GgufTokenizer:
    """The tokenizer of a decoder with its stop tokens, its templates and its sampling settings.

    Raises UserError for stop tokens that a GGUF cannot say: more than the three keys hold, or none at all.
    """
    if not generation.stops:
        default = DEFAULT_EOS.get(tokenizer.model)
        word = "" if default is None or default >= len(tokenizer.tokens) else f", {tokenizer.tokens[default]!r}"
        raise UserError(
            f"{where} names no token that ends a text, and llama.cpp would take number {default}{word}",
            "name it: eos_token in tokenizer_config.json, or eos_token_id in generation_config.json",
        )
    special = {role: token_id for role, token_id in tokenizer.special.items() if role not in STOP_ROLES}
    eos = tokenizer.special.get("eos", generation.stops[0])
    others = [s for s in generation.stops if s != eos and generation.texts.get(s) not in STOPS_BY_TEXT]
    if len(others) >= len(STOP_ROLES):
        named = ", ".join(generation.named(stop) for stop in generation.stops)
        raise UserError(
            f"{where}: {len(generation.stops)} stop tokens ({named}); a GGUF names {len(STOP_ROLES)} (eos, eot, eom),"
            " and llama.cpp does not know these by their text",
            f"leave at most {len(STOP_ROLES)} in eos_token_id, or export as ONNX, which takes a list",
        )
    # In the place where the key stood before, so that models with one stop token keep their bytes.
    order = [*tokenizer.special, *(role for role in STOP_ROLES if role not in tokenizer.special)]
    stops = dict(zip(STOP_ROLES, [eos, *others], strict=False))
    special = {role: {**special, **stops}[role] for role in order if role in special or role in stops}
    texts = {text: token_id for token_id, text in generation.texts.items()}
    also = sorted(texts[t] for t in (STOPS_BY_TEXT | GAPS_BY_TEXT) & texts.keys() if texts[t] not in generation.stops)
    notes = [*tokenizer.notes, *generation.notes, *_unsaid(generation.settings)]
    if also:
        notes.append(f"llama.cpp may also stop at {', '.join(generation.named(i) for i in also)}, by what it is called")
    return replace(
        tokenizer,
        special=special,
        chat_template=generation.template,
        templates={name: text for name, text in generation.templates.items() if name != DEFAULT_TEMPLATE},
        sampling=sampling_keys(generation.settings),
        notes=notes,
    )


def sampling_keys(settings: Mapping[str, Any]) -> dict[str, int | float]:
    """Key after `general.sampling.` → value, of settings as generation.py gives them.

    Where transformers would sample, all that decides how is written: llama.cpp's own defaults are others.
    """
    found: dict[str, int | float] = {}
    if settings.get("do_sample"):
        found["temp"] = float(settings.get("temperature", 1.0))
        found["top_k"] = int(settings.get("top_k", 50))
        found["top_p"] = float(settings.get("top_p", 1.0))
        found["min_p"] = float(settings.get("min_p", 0.0))
    if "repetition_penalty" in settings:
        found["penalty_repeat"] = float(settings["repetition_penalty"])
        found["penalty_last_n"] = WHOLE_CONTEXT
    return found


def _unsaid(settings: Mapping[str, Any]) -> list[str]:
    left = {k: v for k, v in settings.items() if k != "do_sample" and k not in SETTING_OF.values()}
    if not left:
        return []
    said = ", ".join(f"{key} {str(value)[:40]}" for key, value in left.items())
    return [f"generation_config.json's {said}: a GGUF has no key for it, and the app must set it"]
