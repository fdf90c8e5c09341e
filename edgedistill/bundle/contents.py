"""What the files of a bundle hold, held to what the manifest says of them: golden arrays, tokenizer, the artifact."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.bundle.claims import PREPROCESS_FILES, refuse
from edgedistill.bundle.gguf_facts import check_gguf_facts
from edgedistill.bundle.npy import array_of
from edgedistill.bundle.onnx_facts import check_folder_facts, check_onnx_facts
from edgedistill.bundle.tokenizer_facts import check_preprocess
from edgedistill.bundle.trees import checked_tree
from edgedistill.models.hf_tokenizer import tokenizer_bytes
from edgedistill.records.manifest import BundleArtifact, Manifest
from edgedistill.strict import shown

Read = Callable[[str], bytes]
MAX_CONFIG_BYTES = 4 << 20


def check_contents(folder: Path, manifest: Manifest, read: Read) -> list[str]:
    """Raises UserError naming the file that is not what it should be; what could not be checked, as notes."""
    listed = {entry.path: entry for entry in manifest.files}
    for artifact in manifest.artifacts:
        _check_golden(artifact, read)
        for entry in artifact.files:
            if entry.path.endswith(".json"):
                _check_json(f"{artifact.folder}/{entry.path}", artifact.vocab_size, read)
    vocab_size = max(artifact.vocab_size for artifact in manifest.artifacts)
    digest = hashlib.sha256()
    for name in PREPROCESS_FILES:
        path = f"preprocess/{name}"
        if path not in listed:
            continue
        if name.endswith(".json"):
            _check_json(path, vocab_size, read)
        else:
            _text(path, read)
        digest.update(f"{name}\n".encode() + tokenizer_bytes(name, read(path)))
    if digest.hexdigest() != manifest.student.tokenizer_sha256:
        refuse("preprocess/: the tokenizer's files are not those of student.tokenizer_sha256 in manifest.json")
    check_preprocess(read)
    notes: list[str] = []
    for artifact in manifest.artifacts:
        if artifact.format == "gguf":
            notes += check_gguf_facts(folder, manifest, artifact, read)
        elif artifact.format == "onnx":
            check_onnx_facts(folder, artifact, read)
        elif artifact.format == "bitsandbytes":
            check_folder_facts(folder, artifact, read)
    return notes


def _check_golden(artifact: BundleArtifact, read: Read) -> None:
    golden = artifact.golden
    for case in golden.cases:
        _text(case.prompt, read)
        for path, (dtype, shape) in golden.files(case).items():
            values = array_of(read(path), dtype, shape, what=path)
            if dtype == "<f4":
                if not np.isfinite(values).all():
                    refuse(f"{path} holds values that are not finite")
            elif values.min() < 0 or values.max() >= golden.vocab_size:
                refuse(f"{path} holds token ids that are not below {golden.vocab_size}")


def _text(path: str, read: Read) -> str:
    try:
        return read(path).decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(f"{path} is not UTF-8: byte {error.start}")


def _check_json(path: str, vocab_size: int, read: Read) -> None:
    """A configuration is an object of JSON; a tokenizer.json has tokens, each with one id below the vocabulary's."""
    tokenizer = path.endswith("/tokenizer.json")
    data = read(path)
    value = checked_tree(
        data,
        what=path,
        max_bytes=len(data) if tokenizer else MAX_CONFIG_BYTES,
        # A token has a line in the vocabulary and up to two merges of a pair.
        max_values=20_000 + 12 * vocab_size if tokenizer else 200_000,
    )
    if not isinstance(value, dict):
        refuse(f"{path} holds no JSON object")
    if tokenizer:
        check_vocabulary(path, value, vocab_size)


def check_vocabulary(path: str, tree: dict[str, Any], vocab_size: int) -> None:
    """Raises UserError for a tokenizer.json without tokens, or with an id that another token or no row has."""
    model = tree.get("model")
    table = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(table, list):
        if any(not isinstance(one, list) or len(one) != 2 or not isinstance(one[0], str) for one in table):
            refuse(f"{path}: model.vocab is not a list of tokens and scores")
        known: dict[str, Any] = {token: index for index, (token, _) in enumerate(table)}
    elif isinstance(table, dict):
        known = table
    else:
        refuse(f"{path} is not a tokenizer: it has no model.vocab")
    if not known:
        refuse(f"{path} is not a tokenizer: its model.vocab is empty")
    ids = {token_id: token for token, token_id in known.items() if type(token_id) is int}
    if len(ids) != len(known):
        refuse(f"{path}: {len(known):,} tokens have {len(ids):,} different ids")
    added = tree.get("added_tokens") or []
    if not isinstance(added, list):
        refuse(f"{path}: added_tokens is not a list")
    for entry in added:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or not isinstance(entry.get("content"), str):
            refuse(f"{path}: an added token has no id or no content")
        if ids.setdefault(entry["id"], entry["content"]) != entry["content"]:
            refuse(f"{path}: the id {entry['id']} is of two tokens, {shown(ids[entry['id']])} and another")
    if min(ids) < 0 or max(ids) >= vocab_size:
        beyond = max(ids) if min(ids) >= 0 else min(ids)
        refuse(f"{path}: the token id {beyond} is not below the vocabulary's size of {vocab_size}")
