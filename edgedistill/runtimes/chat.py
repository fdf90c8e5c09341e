"""The chat template that ships: which file holds it, what it renders, and that the artifact holds the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedistill.errors import UserError
from edgedistill.records.golden import ChatMessage, GoldenChat, Setting
from edgedistill.runtimes.process import RuntimeProcess

JINJA, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
GGUF_KEY = "tokenizer.chat_template"
VARIABLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
CONVERSATION = (
    ChatMessage(role="user", content="What is 12 × 3?"),
    ChatMessage(role="assistant", content="It is 36."),
    ChatMessage(role="user", content='Thank you! Now say "naïve café" <twice>,\nplease.'),
)
MAX_CONFIG_BYTES = 16 << 20


def template_of(folder: Path) -> tuple[str, str]:
    """(file name, the template that transformers takes of a tokenizer's folder); two empty texts where it has none."""
    if (folder / JINJA).is_file():
        return JINJA, (folder / JINJA).read_text(encoding="utf-8")
    written = _config(folder).get("chat_template")
    if isinstance(written, list):
        named = {entry.get("name"): entry.get("template") for entry in written if isinstance(entry, dict)}
        written = named.get("default")
    return (TOKENIZER_CONFIG, written) if isinstance(written, str) and written else ("", "")


def variables_of(folder: Path) -> dict[str, str]:
    """The special tokens that a template may name."""
    config = _config(folder)
    found = {name: config.get(name) for name in VARIABLES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _config(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG
    if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{TOKENIZER_CONFIG} cannot be read: {str(error)[:200]}", "save the tokenizer again") from error
    return found if isinstance(found, dict) else {}


def made_chat(runtime: RuntimeProcess, tokenizer: Path) -> GoldenChat | None:
    """The recorded conversation, rendered by transformers; None where there is no template.

    Raises UserError where the template refuses it, and where a plain jinja2 renders something else: then apps do too.
    """
    name, template = template_of(tokenizer)
    if not template:
        return None
    messages, rendered = _rendered(runtime, template, tokenizer)
    if "strftime_now" not in template:
        from edgedistill.models.hf_tokenizer import open_auto_tokenizer

        original = open_auto_tokenizer(tokenizer).apply_chat_template(
            [message.model_dump() for message in messages], tokenize=False, add_generation_prompt=True
        )
        if original != rendered:
            raise UserError(
                f"the chat template in {name} renders {rendered[:120]!r} by itself, and transformers makes "
                f"{original[:120]!r} of it",
                "correct the template: it needs something that transformers has and a runtime on a device lacks",
            )
    return GoldenChat(
        template=name,
        template_sha256=hashlib.sha256(template.encode("utf-8")).hexdigest(),
        messages=messages,
        rendered=rendered,
    )


def _rendered(runtime: RuntimeProcess, template: str, tokenizer: Path) -> tuple[list[ChatMessage], str]:
    """The whole conversation, or its first turn where the template takes no more."""
    variables = variables_of(tokenizer)
    try:
        messages = list(CONVERSATION)
        return messages, runtime.render(template, [m.model_dump() for m in messages], variables)
    except UserError:
        messages = messages[:1]
        return messages, runtime.render(template, [m.model_dump() for m in messages], variables)


def chat_differs(chat: GoldenChat | None, preprocess: Path, settings: Mapping[str, Setting], model: Path) -> str:
    """Why the templates that ship are not the recorded one, byte for byte; "" where they are."""
    name, template = template_of(preprocess)
    recorded = chat.template_sha256 if chat is not None else ""
    if _sha256(template) != recorded:
        return f"preprocess/{name or JINJA} is not the chat template that was recorded"
    if "general.architecture" in settings and _setting_sha256(settings.get(GGUF_KEY)) != recorded:
        return f"{GGUF_KEY} of the artifact is not the chat template in preprocess/"
    if model.is_dir() and (beside := template_of(model)[1]) and _sha256(beside) != recorded:
        return f"the chat template in {model.name}/ is not the one in preprocess/"
    return ""


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest() if text else ""


def _setting_sha256(value: Setting) -> str:
    """Of a setting as fingerprint.py keeps it: short ones as they are, long ones as their hash."""
    text = value if isinstance(value, str) else ""
    return text.removeprefix("sha256:") if text.startswith("sha256:") else _sha256(text)


def check_rendering(runtime: RuntimeProcess, chat: GoldenChat, preprocess: Path) -> str:
    """Why what the template renders is not what was recorded; "" where it is."""
    _, template = template_of(preprocess)
    found = runtime.render(template, [m.model_dump() for m in chat.messages], variables_of(preprocess))
    if found == chat.rendered:
        return ""
    return f"the conversation is rendered as {found[:120]!r}, not {chat.rendered[:120]!r}"
