"""A student's vocabulary trimmed to what its text uses, so that a small model does not carry a large one's tokens.

Kept are the ids that the training, calibration and held-out documents use, every added (special) token, every byte, so
that any text can still be spelled, and the tokens that byte-pair merging passes through on the way to a kept one; of
the merges, those whose parts and result are kept. Kept tokens are numbered anew in their old order.

Why the text then encodes to the same tokens: a merge that the full tokenizer makes in it builds a part of a token that
ends up there, so it is kept; at every step the merge of lowest rank is therefore there, and no new one is. What was
written is nevertheless held to that: all documents are encoded again, and a difference is an error.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedistill.data.prepare import read_part
from edgedistill.data.split import PARTS
from edgedistill.errors import UserError
from edgedistill.models.folder import copy_tokenizer, kept_tokens, tokenizer_sha256, vocabulary
from edgedistill.models.generation import GENERATION_FILE
from edgedistill.models.hf_tokenizer import BYTES
from edgedistill.progress import QUIET, Progress
from edgedistill.records.data import DataResult, VocabularyResult
from edgedistill.store import Store, Stored, Work, sha256_of, versions
from edgedistill.strict import read_json
from edgedistill.tasks.causal_lm import Ids, TextTokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn

ENCODED_TOGETHER = 1000  # documents
TEXT_SHOWN = 60
REMEDY = "set student.trim_vocabulary=false"


def byte_alphabet() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes as (Radford et al. 2019), in the bytes' order."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(value) if value in shown else chr(next(others)) for value in range(256)]


def obtain_vocabulary(
    teacher: Path, *, data: Stored[DataResult], store: Store, progress: Progress = QUIET
) -> Stored[VocabularyResult]:
    """The trimmed tokenizer of this teacher and data: found in the store, or made there.

    Raises UserError for a tokenizer that cannot be trimmed.
    """
    inputs = {
        "tokenizer": tokenizer_sha256(teacher),
        "config": sha256_of(teacher / "config.json"),
        "generation": sha256_of(teacher / GENERATION_FILE) if (teacher / GENERATION_FILE).is_file() else None,
        "data": data.result.sha256,
        "versions": versions("tokenizers", "edgedistill"),
    }

    def build(work: Work) -> VocabularyResult:
        progress.say("vocabulary: finding the tokens that the text uses")
        parts = {name: [text for block in read_part(data.directory, name) for text in block] for name in PARTS}
        return trim_tokenizer(teacher, parts, work.out / "tokenizer")

    return store.run("vocabulary", inputs, build, VocabularyResult, progress.say)


def trim_tokenizer(teacher: Path, parts: Mapping[str, Sequence[str]], out: Path) -> VocabularyResult:
    """Write `out`: the teacher's tokenizer, and its config.json, with only the tokens that `parts` of the text need.

    Raises UserError for a tokenizer that is no byte-pair encoding, that cannot spell every text, or whose trimmed form
    would encode the documents otherwise.
    """
    tree = read_json(teacher / "tokenizer.json", what="tokenizer.json")
    spelled = _require_bpe(tree, teacher)
    tokenizer = TextTokenizer.load(teacher)
    encoded = {name: _encode(tokenizer, texts) for name, texts in parts.items()}
    used = {name: _distinct(documents) for name, documents in encoded.items()}
    everything = set().union(*used.values())
    known = vocabulary(teacher, "teacher")
    kept = _closed(tree, everything | {known[token] for token in spelled} | _named(tree, teacher, known))
    new = {old: number for number, old in enumerate(kept)}
    out.mkdir(parents=True)
    _write(tree, teacher, new, out)
    ids = np.array(kept, dtype=np.int64)
    _require_same_tokens(teacher, out, ids, parts, encoded)
    others = set().union(*(tokens for name, tokens in used.items() if name != "held_out"))
    return VocabularyResult(
        path=out.name,
        tokens=len(kept),
        teacher_tokens=len(known),
        used_tokens=len(everything),
        only_held_out_tokens=len(everything - others),
        kept_sha256=hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
        tokenizer_sha256=tokenizer_sha256(out),
    )


def kept_ids(teacher: Path, student: Path) -> NDArray[np.int64] | None:
    """The teacher's id of every token of the student, in the student's order; None where both have the same tokens.

    Raises UserError where the student's tokens are not some of the teacher's in the same order.
    """
    found = kept_tokens(teacher, student)
    return None if found is None else np.array(found, dtype=np.int64)


def kept_rows(teacher: Path, trimmed: Path) -> Tensor:
    """The teacher's ids [V] of the trimmed tokenizer's tokens, also where that has all of them."""
    import torch

    kept = kept_ids(teacher, trimmed)
    return torch.arange(len(vocabulary(teacher))) if kept is None else torch.from_numpy(kept)


def trim_rows(model: nn.Module, trimmed: Path, teacher: Path) -> nn.Module:
    """Cut the teacher's embedding and output head [V, H] to the rows of the trimmed tokenizer's tokens, in place."""
    import torch

    kept = kept_rows(teacher, trimmed)
    config = read_json(trimmed / "config.json", what="config.json")
    whole: Any = model
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    tied = head.weight is embedding.weight
    embedding.weight = torch.nn.Parameter(embedding.weight.detach()[kept].clone())
    embedding.num_embeddings = len(kept)
    embedding.padding_idx = config.get("pad_token_id")
    head.weight = embedding.weight if tied else torch.nn.Parameter(head.weight.detach()[kept].clone())
    head.out_features = len(kept)
    if head.bias is not None:
        head.bias = torch.nn.Parameter(head.bias.detach()[kept].clone())
    new = {int(old): number for number, old in enumerate(kept.tolist())}
    for settings in (whole.config, whole.generation_config):
        for name, value in list(vars(settings).items()):
            if name.endswith("_token_id"):
                setattr(settings, name, _renumbered(value, new))
    whole.config.vocab_size = len(kept)
    whole.vocab_size = len(kept)
    return model


def _require_bpe(tree: Mapping[str, Any], folder: Path) -> list[str]:
    """The tokens that spell bytes; UserError for what is not understood."""
    model = tree.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if kind != "BPE" or not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise UserError(f"the vocabulary of {folder} cannot be trimmed: its tokenizer is {kind}, not BPE", REMEDY)
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UserError(f"the vocabulary of {folder} cannot be trimmed: its BPE has {name} {model[name]!r}", REMEDY)
    spelled = sorted(BYTES) if model.get("byte_fallback") else byte_alphabet()
    missing = [token for token in spelled if token not in model["vocab"]]
    if missing or not (model.get("byte_fallback") or _is_byte_level(tree.get("pre_tokenizer"))):
        why = f"it lacks {len(missing)} of 256 bytes ({missing[0]})" if missing else "it is not byte-level"
        raise UserError(
            f"the vocabulary of {folder} cannot be trimmed: {why}, so text outside of the data could not be spelled",
            REMEDY,
        )
    return spelled


def _is_byte_level(node: Any) -> bool:
    if not isinstance(node, dict):
        return False
    return node.get("type") == "ByteLevel" or any(_is_byte_level(each) for each in node.get("pretokenizers") or [])


def _named(tree: Mapping[str, Any], folder: Path, known: Mapping[str, int]) -> set[int]:
    """Ids that something but text names: added tokens, the unknown token, the ends, configurations."""
    found = {int(entry["id"]) for entry in tree.get("added_tokens") or []}
    unknown = tree["model"].get("unk_token")
    if unknown is not None:
        found.add(known[unknown])

    def note(token_id: int) -> int:
        found.add(token_id)
        return token_id

    _post_processed(tree.get("post_processor"), note, folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            for key, value in read_json(folder / name, what=name).items():
                content = value.get("content") if isinstance(value, dict) else value
                if key.endswith("_token") and isinstance(content, str) and content in known:
                    found.add(known[content])
    real = set(known.values())
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            for key, value in read_json(folder / name, what=name).items():
                if key.endswith("_token_id"):
                    found |= {i for i in (value if isinstance(value, list) else [value]) if i in real}
    return found


def _closed(tree: Mapping[str, Any], ids: set[int]) -> list[int]:
    """`ids` with every token that stands between their characters and them when they are merged, ascending."""
    table: dict[str, int] = tree["model"]["vocab"]
    token_of = {index: token for token, index in table.items()}
    ranks: dict[tuple[str, str], int] = {}
    for rank, merge in enumerate(tree["model"]["merges"]):
        ranks.setdefault(_pair(merge), rank)
    added = {entry["id"] for entry in tree.get("added_tokens") or []}
    kept = set(ids)
    for index in ids - added:
        kept.update(table[part] for part in _made_of(token_of[index], ranks))
    return sorted(kept)


def _made_of(token: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Characters of a token and what merging makes of them on the way to it: the pair of lowest rank first.

    A token in a text came about in just this way: a merge across its ends would have made another one. Empty where
    merging does not lead to it: a byte's token, or one that is only found whole.
    """
    parts = list(token)
    passed = list(parts)
    while len(parts) > 1:
        known = [(ranks[pair], place) for place, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]
        if not known:
            return []
        _, place = min(known)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        passed.append(parts[place])
    return passed


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _write(tree: dict[str, Any], teacher: Path, new: Mapping[int, int], out: Path) -> None:
    """tokenizer.json and its neighbours with the kept tokens under their new ids, and config.json with those ids."""
    copy_tokenizer(teacher, out)
    model = tree["model"]
    vocab = {token: new[index] for token, index in model["vocab"].items() if index in new}
    merges = [merge for merge in model["merges"] if {*_pair(merge), "".join(_pair(merge))} <= vocab.keys()]
    trimmed = {
        **tree,
        "truncation": None,
        "padding": None,
        "model": {**model, "vocab": vocab, "merges": merges},
        "added_tokens": [{**entry, "id": new[entry["id"]]} for entry in tree.get("added_tokens") or []],
        "post_processor": _post_processed(tree.get("post_processor"), lambda index: new[index], teacher),
    }
    _write_json(out / "tokenizer.json", trimmed)
    settings = out / "tokenizer_config.json"
    if settings.is_file():
        values = read_json(settings, what=settings.name)
        decoder = values.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            values["added_tokens_decoder"] = {str(new[int(i)]): entry for i, entry in decoder.items() if int(i) in new}
        _write_json(settings, values)
    added = out / "added_tokens.json"
    if added.is_file():
        listed = read_json(added, what=added.name)
        _write_json(added, {token: new[index] for token, index in listed.items() if index in new})
    config = _with_new_ids(read_json(teacher / "config.json", what="config.json"), new)
    _write_json(out / "config.json", {**config, "vocab_size": len(new)})
    if (teacher / GENERATION_FILE).is_file():
        generation = read_json(teacher / GENERATION_FILE, what=GENERATION_FILE)
        _write_json(out / GENERATION_FILE, _with_new_ids(generation, new))


def _with_new_ids(settings: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    return {key: _renumbered(value, new) if key.endswith("_token_id") else value for key, value in settings.items()}


def _renumbered(value: Any, new: Mapping[int, int]) -> Any:
    """A special token's new id, or a list of them; an id that is no token (a padding row, −1) falls away."""
    if isinstance(value, list):
        return [new[index] for index in value if index in new]
    return new.get(value) if isinstance(value, int) else value


def _post_processed(node: Any, change: Callable[[int], int], folder: Path) -> Any:
    """A post-processor with `change` on every id in it."""
    if node is None:
        return None
    kind = node.get("type")
    if kind == "Sequence":
        return {**node, "processors": [_post_processed(each, change, folder) for each in node["processors"]]}
    if kind == "TemplateProcessing":
        special = {
            name: {**entry, "ids": [change(index) for index in entry["ids"]]}
            for name, entry in node["special_tokens"].items()
        }
        return {**node, "special_tokens": special}
    if kind in ("BertProcessing", "RobertaProcessing"):
        return {**node, **{end: [node[end][0], change(node[end][1])] for end in ("sep", "cls")}}
    if kind == "ByteLevel":
        return node
    raise UserError(f"the vocabulary of {folder} cannot be trimmed: its post-processor is {kind}", REMEDY)


def _require_same_tokens(
    teacher: Path, out: Path, kept: Ids | NDArray[np.int64], parts: Mapping[str, Sequence[str]],
    encoded: Mapping[str, list[Ids]],
) -> None:  # fmt: skip
    """Every kept token has its id, and every document its tokens, or UserError with the first that has not."""
    found = kept_ids(teacher, out)
    if (np.arange(len(kept)) if found is None else found).tolist() != kept.tolist():
        raise UserError(f"the vocabulary of {teacher} cannot be trimmed: its tokens do not stay in order", REMEDY)
    tokenizer = TextTokenizer.load(out)
    token_of = {index: token for token, index in vocabulary(out).items()}
    for index, token in token_of.items():
        if tokenizer.backend.token_to_id(token) != index:
            raise UserError(
                f"the vocabulary of {teacher} cannot be trimmed: token {token!r} would be"
                f" {tokenizer.backend.token_to_id(token)}, not {index}",
                REMEDY,
            )
    for name, texts in parts.items():
        again = _encode(tokenizer, texts)
        for number, (was, now) in enumerate(zip(encoded[name], again, strict=True)):
            if len(was) != len(now) or (kept[now] != was).any():
                raise UserError(
                    f"the vocabulary of {teacher} cannot be trimmed: document {number} of the"
                    f" {name.replace('_', '-')} part ({texts[number][:TEXT_SHOWN]!r}) would have other tokens",
                    REMEDY,
                )


def _encode(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[Ids]:
    return [ids for start in range(0, len(texts), ENCODED_TOGETHER) for ids in
            tokenizer.encode(texts[start : start + ENCODED_TOGETHER])]  # fmt: skip


def _distinct(documents: Sequence[Ids]) -> set[int]:
    """The ids in the documents."""

    def each() -> Iterator[NDArray[Any]]:
        for start in range(0, len(documents), ENCODED_TOGETHER):
            yield np.unique(np.concatenate(documents[start : start + ENCODED_TOGETHER]))

    return {int(index) for part in each() for index in part}


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, ensure_ascii=False, indent=1), encoding="utf-8")
