"""A GGUF's tokenizer, stop tokens, templates and sampling settings against those of the folder that it was made of.

The keys are compared as they are written, and llama.cpp itself is asked where it stops: it ends a text at tokens whose
text it knows, and takes a word of its own choice where a key is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgedistill.gguf.generation_keys import GAPS_BY_TEXT, SAMPLING, STOP_ROLES, STOPS_BY_TEXT
from edgedistill.gguf.reader import GgufFile
from edgedistill.gguf.tokenizer import general_name
from edgedistill.gguf.tokenizer_files import UNUSED, GgufTokenizer
from edgedistill.models.generation import Generation
from edgedistill.records.finding import Finding, difference_of, shown

GGML = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
SETTING_TOLERANCE = 1e-6
# Of general.*, what this package writes: more says who made the model and under which licence, and nothing here knows.
GENERAL = frozenset(["architecture", "type", "name", "file_type", "quantization_version", "alignment"])
# Keys that end a text beside the stop roles; a code model's gaps.
GAP_ROLES = ("fim_pad", "fim_rep", "fim_sep")


@dataclass(frozen=True)
class Vocabulary:
    """What the folder says: the tokenizer as edgedistill would write it, None for one that it does not know, and its
    generation facts, None for a model that generates no text."""

    tokenizer: GgufTokenizer | None
    generation: Generation | None


def vocabulary_findings(
    reader: GgufFile, expected: Vocabulary, runtime: Mapping[str, Any], *, converted: bool
) -> Iterator[Finding]:
    """`runtime`: what llama.cpp says of itself (RuntimeProcess.generation). `converted`: by the user's own script,
    whose scores, types and names of rows without a token may be others; what they do is compared in the runtime."""
    tokenizer, generation = expected.tokenizer, expected.generation
    if tokenizer is not None:
        yield from _tokens(reader, tokenizer, converted=converted)
        if not converted:
            yield from _own_keys(reader, tokenizer)
        yield from _ends(reader, tokenizer, runtime)
    if generation is not None:
        yield from _stops(reader, generation, runtime)
        yield from template_findings(reader, generation, runtime)
        if tokenizer is not None:
            yield from _sampling(reader, tokenizer, generation, converted=converted)


def _tokens(reader: GgufFile, tokenizer: GgufTokenizer, *, converted: bool) -> Iterator[Finding]:
    found = reader.value(f"{GGML}tokens")
    if not isinstance(found, list) or len(found) != len(tokenizer.tokens):
        count = len(found) if isinstance(found, list) else None
        yield Finding("tokenizer", f"{GGML}tokens", f"has {count} tokens, the model {len(tokenizer.tokens)}")
        return
    free = {i for i, kind in enumerate(tokenizer.types) if kind == UNUSED} if converted else set()
    wrong = [i for i, (a, b) in enumerate(zip(found, tokenizer.tokens, strict=True)) if a != b and i not in free]
    if wrong:
        at = wrong[0]
        seen, original = shown(found[at]), shown(tokenizer.tokens[at])
        said = f"differs in {len(wrong):,} tokens: {at} is {seen}, the model's is {original}"
        yield Finding("tokenizer", f"{GGML}tokens", said)
    yield from _list(reader, "merges", tokenizer.merges)
    if tokenizer.model not in (reader.value(f"{GGML}model"),):
        found_model = reader.value(f"{GGML}model")
        yield Finding("tokenizer", f"{GGML}model", f"is {shown(found_model)}, not {shown(tokenizer.model)}")


def _list(reader: GgufFile, name: str, wanted: Sequence[Any]) -> Iterator[Finding]:
    found = reader.value(f"{GGML}{name}") or []
    if list(found) == list(wanted):
        return
    at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted)))
    seen, original = (shown(values[at]) if at < len(values) else "missing" for values in (found, wanted))
    yield Finding("tokenizer", f"{GGML}{name}", f"differs from the model's, first at {at}: {seen}, and not {original}")


def _own_keys(reader: GgufFile, tokenizer: GgufTokenizer) -> Iterator[Finding]:
    """All that this package's own converter writes, and nothing else: a runtime may heed whatever is there."""
    import numpy as np

    yield from _list(reader, "token_type", tokenizer.types)
    yield from _list(reader, "scores", [float(np.float32(score)) for score in tokenizer.scores])
    wanted: dict[str, Any] = {"pre": tokenizer.pre, "add_space_prefix": tokenizer.add_space_prefix}
    wanted |= {"add_bos_token": tokenizer.add_bos, "add_eos_token": tokenizer.add_eos}
    wanted |= {f"{role}_token_id": token_id for role, token_id in tokenizer.special.items()}
    wanted |= {key: list(value) if isinstance(value, bytes) else value for key, value in tokenizer.extra.items()}
    for key, value in wanted.items():
        found = reader.value(f"{GGML}{key}")
        if found != value:
            yield Finding("tokenizer", f"{GGML}{key}", f"is {shown(found)}, the model's is {shown(value)}")
    known = {f"{GGML}{key}" for key in (*wanted, "tokens", "model", "scores", "token_type", "merges")}
    # of an encoder with one type of tokens; the sequence's templates are compared by themselves
    known |= {f"{GGML}token_type_count"}
    architecture = reader.value("general.architecture")
    for field in reader.keys:
        named = field.startswith(("GGUF.", f"{architecture}.", TEMPLATE, SAMPLING, "split."))
        general = field.startswith("general.") and field.removeprefix("general.") in GENERAL
        if not named and not general and field not in known:
            said = f"is {shown(reader.value(field))}, and the model's files say nothing of it"
            yield Finding("tokenizer" if field.startswith("tokenizer.") else "metadata", field, said)
    kind, name = reader.value("general.type"), reader.value("general.name")
    if kind != "model":
        yield Finding("metadata", "general.type", f"is {shown(kind)}, not 'model'")
    if name is None or general_name(str(name), tokenizer) != name:
        yield Finding("metadata", "general.name", f"is {shown(name)}, and llama.cpp reads tokens by it")


def _ends(reader: GgufFile, tokenizer: GgufTokenizer, runtime: Mapping[str, Any]) -> Iterator[Finding]:
    for role, wanted in (("bos", tokenizer.add_bos), ("eos", tokenizer.add_eos)):
        if tokenizer.model != "bert" and bool(runtime[f"adds_{role}"]) != wanted:
            yield Finding(
                "tokenizer", f"{GGML}add_{role}_token",
                f"is {shown(reader.value(f'{GGML}add_{role}_token'))}: llama.cpp"
                f" {'adds' if runtime[f'adds_{role}'] else 'does not add'} {role.upper()}, and the model's tokenizer"
                f" {'does' if wanted else 'does not'}",
            )  # fmt: skip
    bos = tokenizer.special.get("bos")
    found = reader.value(f"{GGML}bos_token_id")
    if bos is not None and tokenizer.model != "bert" and found != bos:
        yield Finding("tokenizer", f"{GGML}bos_token_id", f"is {shown(found)}, the model's is {bos}")


def _stops(reader: GgufFile, generation: Generation, runtime: Mapping[str, Any]) -> Iterator[Finding]:
    found, wanted = set(runtime["stops"]), set(generation.stops)
    for token in sorted(wanted - found):
        yield Finding("stops", "the stop tokens", f"lack {generation.named(token)}: llama.cpp would not stop there")
    keys = {role: reader.value(f"{GGML}{role}_token_id") for role in (*STOP_ROLES, *GAP_ROLES)}
    for token in sorted(found - wanted):
        text = generation.texts.get(token)
        role = next((role for role, token_id in keys.items() if token_id == token), None)
        by_text = text in STOPS_BY_TEXT or text in GAPS_BY_TEXT
        # Of eos the model's own is known: another one by its key is another one, whatever it is called.
        if by_text and role != "eos":
            continue
        # llama.cpp's own list of texts is longer in later versions; a word that a key or a default made one is not.
        if role is None and token != runtime["eos"]:
            continue
        name = f"{GGML}{role}_token_id" if role else f"{GGML}eos_token_id"
        yield Finding(
            "stops", name,
            f"ends a text at {generation.named(token)}; the model's stop tokens are"
            f" {', '.join(generation.named(t) for t in generation.stops) or 'none'}",
        )  # fmt: skip
    if keys["eos"] is not None and keys["eos"] not in wanted and keys["eos"] not in found:
        yield Finding("stops", f"{GGML}eos_token_id", f"is {shown(keys['eos'])}, which is not a token")


def template_findings(reader: GgufFile, generation: Generation, runtime: Mapping[str, Any]) -> Iterator[Finding]:
    """The chat templates, byte for byte, in the file and as llama.cpp gives the default one."""
    for name, wanted in {"default": "", **generation.templates}.items():
        key = TEMPLATE if name == "default" else f"{TEMPLATE}.{name}"
        found = reader.value(key) or ""
        if found != wanted:
            yield Finding("template", key, difference_of(found, wanted))
    known = {TEMPLATE, *(f"{TEMPLATE}.{name}" for name in generation.templates)}
    named = [name for name in generation.templates if name != "default"]
    if named or reader.value(f"{TEMPLATE}s") is None:
        known.add(f"{TEMPLATE}s")
    for field in reader.keys:
        if field.startswith(TEMPLATE) and field not in known:
            yield Finding("template", field, "is in the file, and the model has no such template")
    if (runtime.get("template") or "") != generation.template:
        said = difference_of(runtime.get("template") or "", generation.template)
        yield Finding("template", "llama.cpp's chat template", said)


def _sampling(
    reader: GgufFile, tokenizer: GgufTokenizer, generation: Generation, *, converted: bool
) -> Iterator[Finding]:
    found = {key.removeprefix(SAMPLING): reader.value(key) for key in reader.keys if key.startswith(SAMPLING)}
    # llama.cpp's own script copies some of generation_config.json's values under these keys, whatever do_sample says.
    also = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"} if converted else {}
    for key, value in found.items():
        wanted = tokenizer.sampling.get(key)
        if wanted is None and key in also:
            wanted = generation.written.get(also[key])
        if not _close(value, wanted):
            said = "the model's files say nothing of it" if wanted is None else f"the model's is {shown(wanted)}"
            yield Finding("settings", f"{SAMPLING}{key}", f"is {shown(value)}, and {said}")
    for key, wanted in tokenizer.sampling.items():
        if key not in found and not converted:
            yield Finding("settings", f"{SAMPLING}{key}", f"is missing, the model's is {shown(wanted)}")


def _close(found: Any, wanted: Any) -> bool:
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return math.isclose(found, wanted, rel_tol=SETTING_TOLERANCE)
    return bool(found == wanted)
