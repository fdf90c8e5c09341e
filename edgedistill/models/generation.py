"""What a model folder says of generating text: where it stops, how a conversation is rendered, with what settings.

Read once, strictly; the exporters write it, and the checks hold artifacts to it. No torch, no transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgedistill.errors import UserError
from edgedistill.models.hf_tokenizer import tokenizer_tree
from edgedistill.strict import read_json

GENERATION_FILE = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
DEFAULT_TEMPLATE = "default"
# What transformers takes where generation_config.json is silent; only what differs from it is a setting of the model.
USUAL: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "max_length": 20,
    "max_new_tokens": None,
    "min_new_tokens": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "penalty_alpha": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
    "stop_strings": None,
    "max_time": None,
}
# setting → (lowest, highest) that means something; None: no bound
BOUNDS: dict[str, tuple[float, float | None]] = {
    "temperature": (0, None),
    "top_k": (0, None),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, None),
    "no_repeat_ngram_size": (0, None),
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "min_length": (0, None),
    "max_length": (1, None),
    "max_new_tokens": (1, None),
}
SAMPLING = ("temperature", "top_k", "top_p", "min_p")  # they do nothing where `do_sample` is off


@dataclass(frozen=True)
class Generation:
    """stops      ids that end a text, in order: the tokenizer's eos first, then those of the model's configuration
    texts         id → token, of every token that the tokenizer has
    plain         the stops that are no special tokens
    templates     name → Jinja text as it is in the files, "default" the one that is used unasked; none: empty
    settings      generation_config.json's, those that differ from what transformers takes anyway
    written       generation_config.json as it is
    notes         where the files say different things, and what was made of it
    """

    stops: tuple[int, ...]
    texts: Mapping[int, str] = field(repr=False)
    plain: tuple[int, ...] = ()
    templates: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def template(self) -> str:
        """The default template, or "" where there is none."""
        return self.templates.get(DEFAULT_TEMPLATE, "")

    def named(self, token_id: int) -> str:
        """An id and its token: 128009 ('<|eot_id|>')."""
        return f"{token_id} ({self.texts[token_id]!r})" if token_id in self.texts else f"{token_id} (no token)"


def generation_of(folder: Path, *, vocab_size: int) -> Generation:
    """The generation facts of a model folder whose embedding has `vocab_size` rows.

    Raises UserError where a stop token is no id of the tokenizer's, and for files and settings that say nothing
    sensible.
    """
    tokenizer = tokenizer_tree(folder / "tokenizer.json")
    texts, special = _tokens(tokenizer)
    stops, notes = _stops(folder, texts, vocab_size)
    path = folder / GENERATION_FILE
    found = Generation(
        stops=stops,
        texts=texts,
        plain=tuple(stop for stop in stops if stop not in special),
        templates=chat_templates(folder),
        settings=generation_settings(folder),
        written=read_json(path, what=GENERATION_FILE) if path.is_file() else {},
    )
    notes += [f"{found.named(s)} is a word and no special token, and generation stops at it" for s in found.plain]
    if not stops:
        notes.append("neither the model's configuration nor its tokenizer names a token that ends a text")
    return replace(found, notes=tuple(notes))


def generation_settings(folder: Path) -> dict[str, Any]:
    """generation_config.json's settings that differ from transformers' own. UserError for values out of their range."""
    path = folder / GENERATION_FILE
    written = read_json(path, what=GENERATION_FILE) if path.is_file() else {}
    found = {}
    for key, usual in USUAL.items():
        value = written.get(key)
        if value is None or value == usual:
            continue
        if key in BOUNDS:
            low, high = BOUNDS[key]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not low <= value <= (float("inf") if high is None else high) or value == float("inf"):
                most = "" if high is None else f" to {high:g}"
                raise UserError(f"{path}: {key} is {value!r}", f"it is a number from {low:g}{most}")
        if key == "do_sample" and not isinstance(value, bool):
            raise UserError(f"{path}: do_sample is {value!r}", "it is true or false")
        found[key] = value
    if not found.get("do_sample"):
        for key in SAMPLING:
            found.pop(key, None)
    return found


def chat_templates(folder: Path) -> dict[str, str]:
    """name → template as transformers 5 finds them: files before tokenizer_config.json, "default" first.

    The text is that of the file, line ends included. UserError for a file that is no UTF-8, and for a template that
    is no text.
    """
    found: dict[str, str] = {}
    path = folder / "tokenizer_config.json"
    written = read_json(path, what=path.name).get("chat_template") if path.is_file() else None
    if isinstance(written, str):
        found[DEFAULT_TEMPLATE] = written
    elif isinstance(written, list):
        for entry in written:
            named = entry if isinstance(entry, dict) else {}
            name, template = named.get("name"), named.get("template")
            if not isinstance(name, str) or not isinstance(template, str):
                raise UserError(f"{path}: chat_template holds {str(entry)[:80]!r}", "each is a name and a template")
            found[name] = template
    elif written is not None:
        raise UserError(f"{path}: chat_template is {str(written)[:80]!r}", "it is a text, or a list of named texts")
    if (folder / TEMPLATE_FILE).is_file():
        found[DEFAULT_TEMPLATE] = _text(folder / TEMPLATE_FILE)
    for file in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        found[file.stem] = _text(file)
    return {name: found[name] for name in sorted(found, key=lambda name: (name != DEFAULT_TEMPLATE, name))}


def render(template: str, messages: list[dict[str, str]], *, bos: str = "", eos: str = "") -> str:
    """What a chat template makes of messages, the assistant's turn opened, as transformers renders it.

    In Jinja's immutable sandbox. Raises UserError where the template fails.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(
            conversations=[messages], chat_template=template, add_generation_prompt=True, bos_token=bos, eos_token=eos
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(
            f"the chat template fails: {error}", "correct it; transformers cannot render it either"
        ) from error
    return str(rendered[0])


def generation_sha256(folder: Path) -> str:
    """Hash of the files that say how to generate and that no hash of weights or tokenizer holds."""
    digest = hashlib.sha256()
    for path in [folder / GENERATION_FILE, folder / TEMPLATE_FILE, *sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))]:
        if path.is_file():
            digest.update(f"{path.name}:{path.stat().st_size}:".encode() + path.read_bytes())
    return digest.hexdigest()


def token_ids(value: Any, what: str) -> tuple[int, ...]:
    """The ids that a configuration names under `eos_token_id`: none, one or several. UserError for anything else."""
    if value is None:
        return ()
    listed = value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) for item in listed):
        raise UserError(f"{what} is {str(value)[:80]!r}", "it is a token's id, or a list of ids")
    return tuple(dict.fromkeys(listed))


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}", "save it as UTF-8") from error


def _tokens(tokenizer: Mapping[str, Any]) -> tuple[dict[int, str], frozenset[int]]:
    """id → token, and the ids of special tokens."""
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    texts: dict[int, str] = {}
    if isinstance(vocab, dict):
        texts = {int(token_id): str(token) for token, token_id in vocab.items()}
    elif isinstance(vocab, list):
        texts = {index: str(entry[0]) for index, entry in enumerate(vocab)}
    added = [entry for entry in tokenizer.get("added_tokens") or [] if isinstance(entry, dict)]
    texts |= {int(entry["id"]): str(entry["content"]) for entry in added}
    return texts, frozenset(int(entry["id"]) for entry in added if entry.get("special"))


def _stops(folder: Path, texts: Mapping[int, str], vocab_size: int) -> tuple[tuple[int, ...], list[str]]:
    """All stop tokens that the folder's files name, the tokenizer's first, and where they differ, in words."""
    named: dict[str, tuple[int, ...]] = {}
    tokenizer_eos = _tokenizer_eos(folder, texts)
    if tokenizer_eos is not None:
        named["the tokenizer"] = (tokenizer_eos,)
    for name in (GENERATION_FILE, "config.json"):
        for ids, where in _configured(folder / name):
            for token_id in ids:
                if not 0 <= token_id < vocab_size or token_id not in texts:
                    raise UserError(
                        f"{folder / name}: {where} {token_id} is not a token of this model's {len(texts):,}",
                        "name the token that ends a text, or leave it out",
                    )
            if ids:
                named.setdefault(name, ids)
    stops = tuple(dict.fromkeys(token_id for ids in named.values() for token_id in ids))
    # Where generation_config.json names some, transformers stops at those alone.
    decisive = next((named[n] for n in (GENERATION_FILE, "config.json") if n in named), stops)
    notes = []
    if set(stops) != set(decisive):
        said = "; ".join(f"{name} says {', '.join(map(str, ids))}" for name, ids in named.items())
        notes.append(f"the files name different stop tokens ({said}): generation stops at each of them")
    return stops, notes


def _configured(path: Path) -> Iterator[tuple[tuple[int, ...], str]]:
    config = read_json(path, what=path.name) if path.is_file() else {}
    yield token_ids(config.get("eos_token_id"), f"{path}: eos_token_id"), "eos_token_id"
    nested = config.get("text_config")
    if isinstance(nested, dict):
        yield token_ids(nested.get("eos_token_id"), f"{path}: text_config.eos_token_id"), "text_config.eos_token_id"


def _tokenizer_eos(folder: Path, texts: Mapping[int, str]) -> int | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        value = read_json(path, what=name).get("eos_token") if path.is_file() else None
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str) and content:
            found = next((token_id for token_id, text in texts.items() if text == content), None)
            if found is None:
                raise UserError(
                    f"{path}: eos_token {content!r} has no id", "save model and tokenizer again with the same tokens"
                )
            return found
    return None
