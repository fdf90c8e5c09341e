"""preprocess/, held to itself and to the tokenizer that each artifact has.

Read, not run: a tokenizer of somebody's may hold a pattern that never ends.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from edgedistill.bundle.claims import refuse
from edgedistill.bundle.trees import tree_of
from edgedistill.errors import UserError
from edgedistill.gguf.tokenizer_files import added_ends
from edgedistill.guards.allowed import CODE
from edgedistill.guards.gguf import GgufHeader
from edgedistill.guards.tokenizer import is_merge
from edgedistill.models.generation import DEFAULT_TEMPLATE
from edgedistill.records.manifest import MANIFEST, BundleArtifact, Manifest
from edgedistill.strict import shown

Read = Callable[[str], bytes]
PREPROCESS = "preprocess"
CONFIG, SPECIAL_MAP, TEMPLATE = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
# Files that name the special tokens
NAMING = (CONFIG, SPECIAL_MAP)
ROLES = (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown"))
CONVERTER = "converter"  # in tool_versions: a script of the user's own wrote the GGUF
CONVERTED = "converted by "
BESIDE_AN_ARTIFACT = ("tokenizer.json",)
BESIDE_A_FOLDER = ("tokenizer.json", CONFIG, SPECIAL_MAP, TEMPLATE)


def check_preprocess(read: Read) -> None:
    """The files of preprocess/ ask for no code, and give each token the id that tokenizer.json gives it."""
    ids = _ids(read)
    for name in NAMING:
        _refuse_code(f"{PREPROCESS}/{name}", _tree(f"{PREPROCESS}/{name}", read))
    decoder = _tree(f"{PREPROCESS}/{CONFIG}", read).get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        refuse(f"{PREPROCESS}/{CONFIG}: added_tokens_decoder is not a table")
    listed = [
        (CONFIG, _text(entry, f"{PREPROCESS}/{CONFIG}"), int(number) if number.isdecimal() else number)
        for number, entry in decoder.items()
    ]
    listed += [("added_tokens.json", *one) for one in _tree(f"{PREPROCESS}/added_tokens.json", read).items()]
    for name, token, token_id in listed:
        if type(token_id) is not int or token is None or ids.get(token) != token_id:
            refuse(
                f"{PREPROCESS}/{name} gives {shown(token)} the id {shown(token_id)}, and tokenizer.json "
                f"{shown(ids.get(token or ''))}"
            )


def check_gguf_tokenizer(manifest: Manifest, artifact: BundleArtifact, head: GgufHeader, read: Read) -> list[str]:
    """preprocess/ has the artifact's own tokens, merges, special tokens and chat templates. Notes on what it has not.

    A script of the user's own may write tokens in its own way: then only a word of the plain vocabulary is compared.
    """
    converted = any(note.startswith(CONVERTED) for note in artifact.notes)
    if converted and CONVERTER not in manifest.tool_versions:
        refuse(f"{MANIFEST}: a script converted {artifact.name}, and tool_versions names no {CONVERTER}")
    tree = _tree(f"{PREPROCESS}/tokenizer.json", read)
    tokens, kind = _strings(head, "tokenizer.ggml.tokens"), head.values.get("tokenizer.ggml.model")
    ids, added = _ids(read), {entry["content"]: entry["id"] for entry in tree.get("added_tokens") or []}
    # WordPiece's tokens are written otherwise in a GGUF; added ones are as they are.
    compared = added if kind == "bert" else ids
    if converted:
        compared = {token: one for token, one in ids.items() if token not in added} if kind == "gpt2" else {}
    for token, token_id in compared.items():
        if tokens[token_id] != token:
            _differs(artifact, f"token {token_id} is {shown(token)}, and the artifact's {shown(tokens[token_id])}")
    if kind == "gpt2":
        listed = tree["model"].get("merges") or []
        if not isinstance(listed, list) or not all(map(is_merge, listed)):
            refuse(f"{PREPROCESS}/tokenizer.json has a merge that is not a pair of tokens")
        merges = [one if isinstance(one, str) else " ".join(one) for one in listed]
        if merges != _strings(head, "tokenizer.ggml.merges"):
            _differs(artifact, "tokenizer.ggml.merges are others")
    _check_special(artifact, head, ids, read)
    _check_templates(artifact, head, read, converted=converted)
    if converted:
        parts = "special tokens, merges and plain tokens" if kind == "gpt2" else "special tokens"
        return [
            f"another script converted {artifact.name}: of its tokenizer only the {parts} and the chat template that "
            f"it has were compared with {PREPROCESS}/"
        ]
    return _check_ends(artifact, head, tree, read)


def check_copied_tokenizer(artifact: BundleArtifact, read: Read) -> None:
    """A folder that has a tokenizer of its own has that of preprocess/: tokens, special tokens and chat template."""
    for name in BESIDE_A_FOLDER if artifact.format == "bitsandbytes" else BESIDE_AN_ARTIFACT:
        ours, other = _bytes(f"{PREPROCESS}/{name}", read), _bytes(f"{artifact.folder}/{name}", read)
        if ours != other:
            _differs(artifact, f"{artifact.folder}/{name} is another than {PREPROCESS}/{name}")
    for name in NAMING:
        here, there = (_tree(f"{folder}/{name}", read) for folder in (PREPROCESS, artifact.folder))
        for token, _ in ROLES:
            one, two = _text(here.get(token), name), _text(there.get(token), name)
            if None not in (one, two) and one != two:
                _differs(artifact, f"{token} of {name} is {shown(one)}, and the artifact's {shown(two)}")
    one, two = (_templates(folder, read).get(DEFAULT_TEMPLATE, "") for folder in (PREPROCESS, artifact.folder))
    if one != two:
        _differs(artifact, "its chat template is another")


def check_stop_tokens(artifact: BundleArtifact, stops: Any, read: Read) -> None:
    """The tokenizer's own end of text is among the tokens at which the artifact's runtime stops."""
    ids, listed = _ids(read), stops if isinstance(stops, list) else [stops]
    text = _text(_tree(f"{PREPROCESS}/{CONFIG}", read).get("eos_token"), CONFIG)
    if text is not None and ids.get(text) not in listed:
        _differs(artifact, f"eos_token is {shown(text)} ({ids.get(text)}), and it stops at {shown(listed)}")


def _check_special(artifact: BundleArtifact, head: GgufHeader, ids: Mapping[str, int], read: Read) -> None:
    for file in NAMING:
        config = _tree(f"{PREPROCESS}/{file}", read)
        for name, role in ROLES:
            text, found = _text(config.get(name), file), head.values.get(f"tokenizer.ggml.{role}_token_id")
            if text is not None and found is not None and ids.get(text) != found:
                key = f"tokenizer.ggml.{role}_token_id"
                _differs(artifact, f"{key} is {found}, not {ids.get(text)} ({name} {shown(text)} of {file})")


def _check_templates(artifact: BundleArtifact, head: GgufHeader, read: Read, *, converted: bool) -> None:
    found = {DEFAULT_TEMPLATE: "", **_templates(PREPROCESS, read)}
    for name, template in found.items():
        key = "tokenizer.chat_template" + ("" if name == DEFAULT_TEMPLATE else f".{name}")
        if converted and key not in head.values:
            continue
        if template != head.values.get(key, ""):
            _differs(artifact, f"{shown(key)} is another")


def _check_ends(artifact: BundleArtifact, head: GgufHeader, tree: dict[str, Any], read: Read) -> list[str]:
    """What is put around a text: as the post-processor says, which alone decides in transformers."""
    where = f"{PREPROCESS}/tokenizer.json"
    try:
        before, behind = added_ends(tree, where=where)
    except (KeyError, TypeError, AttributeError, IndexError, UserError):
        refuse(f"{where}: its post_processor is none that a GGUF can have")
    bert = head.values.get("tokenizer.ggml.model") == "bert"
    config = _tree(f"{PREPROCESS}/{CONFIG}", read)
    notes = []
    for name, token in (("add_bos_token", before), ("add_eos_token", behind)):
        found, said = bool(head.values.get(f"tokenizer.ggml.{name}", False)), config.get(name)
        if found != (token is not None) and not (bert and name == "add_eos_token"):
            _differs(artifact, f"tokenizer.ggml.{name} is {found}, and the post-processor adds {shown(token)}")
        if said is not None and said != found:
            notes.append(
                f"{PREPROCESS}/{CONFIG} says {name}={shown(said)}, which transformers ignores; {artifact.name} and "
                f"tokenizer.json say {found}"
            )
    return notes


def _templates(folder: str, read: Read) -> dict[str, str]:
    """Name → chat template, the file before what tokenizer_config.json says."""
    where = f"{folder}/{CONFIG}"
    written = _tree(where, read).get("chat_template")
    found: dict[str, str] = {}
    for entry in written if isinstance(written, list) else [{"name": DEFAULT_TEMPLATE, "template": written}]:
        name, template = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if written is None:
            continue
        if not isinstance(name, str) or not isinstance(template, str) or name in found:
            refuse(f"{where}: chat_template is neither a text nor a list of named texts")
        found[name] = template
    data = _bytes(f"{folder}/{TEMPLATE}", read)
    if data is not None:
        found[DEFAULT_TEMPLATE] = data.decode("utf-8", errors="replace")
    return found


def _ids(read: Read) -> dict[str, int]:
    """Token → id of preprocess/tokenizer.json, whose form was checked."""
    tree = _tree(f"{PREPROCESS}/tokenizer.json", read)
    vocab = tree["model"]["vocab"]
    ids = {token: number for number, (token, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    return ids | {entry["content"]: entry["id"] for entry in tree.get("added_tokens") or []}


def _text(value: Any, where: str) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        refuse(f"{where}: the token {shown(value)} is not a text")
    return text


def _refuse_code(where: str, value: Any) -> None:
    for key, one in value.items() if isinstance(value, dict) else ():
        if key in CODE:
            refuse(f"{where}: {key} asks for code that is not the runtime's own")
        _refuse_code(where, one)
    for one in value if isinstance(value, list) else ():
        _refuse_code(where, one)


def _tree(path: str, read: Read) -> dict[str, Any]:
    """A file of JSON, whose form was checked; empty where there is none."""
    data = _bytes(path, read)
    return {} if data is None else dict(tree_of(data))


def _bytes(path: str, read: Read) -> bytes | None:
    try:
        return read(path)
    except KeyError:
        return None


def _differs(artifact: BundleArtifact, how: str) -> NoReturn:
    refuse(f"{PREPROCESS}/ is not the tokenizer of {artifact.name}: {how}")


def _strings(head: GgufHeader, key: str) -> list[str]:
    """The texts of an array; [] where there is none."""
    if key not in head.arrays:
        return []
    start, size = head.spans[key]
    with head.path.open("rb") as file:
        file.seek(start)
        data = file.read(size)
    length_at = struct.Struct("<Q").unpack_from
    found, at = [], 0
    for _ in range(head.arrays[key][1]):
        end = at + 8 + length_at(data, at)[0]
        found.append(data[at + 8 : end].decode("utf-8", errors="replace"))
        at = end
    return found
