"""Model folders: found, checked before anything loads them, hashed.

Only safetensors are read (weights.py). Nothing here imports torch or transformers.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.errors import UserError
from edgedistill.models.companions import TOKENIZER_NAMES
from edgedistill.models.families import DECODERS
from edgedistill.models.hf_tokenizer import copy_tokenizer as copy_tokenizer
from edgedistill.models.hf_tokenizer import cut_note, require_all_tokens
from edgedistill.models.hf_tokenizer import open_for_text as open_for_text
from edgedistill.models.hf_tokenizer import open_tokenizer as open_tokenizer
from edgedistill.models.hf_tokenizer import tokenizer_sha256 as tokenizer_sha256
from edgedistill.models.hf_tokenizer import vocabulary as vocabulary
from edgedistill.models.shapes import shape_from_config
from edgedistill.models.weights import (
    EMBEDDING,
    StoredTensor,
    check_tensors,
    refuse_wrapped,
    require_finite,
    stored_tensors,
)
from edgedistill.records.shape import Shape
from edgedistill.store import Store, canonical_json
from edgedistill.strict import local_path, open_regular, read_json

READ_SUFFIXES = frozenset({".json", ".jinja", ".safetensors", ".txt", ".model"})
SMALL_JSON = ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json")
MAX_SMALL_JSON_BYTES = 1 << 25
# transformers changes weights by the first as it loads them
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "LICENSE*", "NOTICE*", *TOKENIZER_NAMES]


@dataclass(frozen=True)
class ModelFolder:
    """A checked folder: `shape` from its config, `tensors` name → shape from the safetensors headers."""

    path: Path
    name: str
    origin: str
    config: dict[str, Any]
    shape: Shape
    tensors: dict[str, tuple[int, ...]]
    weight_files: tuple[Path, ...]


def open_model(name_or_path: str, *, revision: str | None = None, role: str = "model") -> ModelFolder:
    """A model's local folder, fetched from the hub where the name is no folder, and checked.

    Raises UserError: no such model, no weights, pickles only, truncated safetensors, an unsupported
    architecture, weights that do not fit the config.
    """
    path, origin = locate(name_or_path, revision=revision, role=role)
    return check_folder(path, name=name_or_path, origin=origin, role=role)


def locate(name_or_path: str, *, revision: str | None = None, role: str = "model") -> tuple[Path, str]:
    """The local folder of a model of any architecture, and "folder" or "hub". UserError where there is none."""
    path = local_path(name_or_path, what=role)
    if path.is_dir():
        require_plain_files(path, role)
        return path.resolve(), "folder"
    if os.path.lexists(path):
        raise UserError(f"{role} {name_or_path} is a file", "name the folder that holds config.json and the weights")
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1:
        raise UserError(
            f"no {role} {name_or_path}: no such folder", "give a folder, or a hub id like `organisation/name`"
        )
    fetched = _fetch(name_or_path, revision, role)
    require_plain_files(fetched, role)
    return fetched, "hub"


def require_plain_files(folder: Path, role: str) -> None:
    """Refuse a folder in which a library would block on a FIFO, or read JSON that says two things. UserError.

    The large files are read by who needs them: tokenizer.json, the index, the weights.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix not in READ_SUFFIXES:
            continue
        with open_regular(path, what=f"{role}'s file"):
            pass
        if path.name in SMALL_JSON:
            read_json(path, what=path.name, max_bytes=MAX_SMALL_JSON_BYTES)
        if path.name in ADAPTER_FILES:
            raise UserError(
                f"{role} folder {folder} holds an adapter ({path.name})",
                "merge it into the weights first (peft: merge_and_unload), and save them with save_pretrained",
            )


def _fetch(name: str, revision: str | None, role: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_PATTERNS))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"no {role} '{name}': no such folder, and the hub did not give it ({reason})",
            "check the name, your connection and your access, or give a local folder",
        ) from error


def check_folder(path: Path, *, name: str, origin: str, role: str) -> ModelFolder:
    """Read and check what says what a model is; the weights' bytes are not read, only their headers."""
    config_path = path / "config.json"
    if not config_path.is_file():
        raise UserError(
            f"{role} folder {path} has no config.json", "name a folder that transformers' save_pretrained wrote"
        )
    config = read_json(config_path, what="config.json")
    stored = stored_tensors(path)
    shape = shape_from_config(config, where=str(config_path))
    name_of_embedding, stored = _embedding_of(config), _modules(stored, config)
    tensors = {name: tensor.shape for name, tensor in stored.items()}
    embedding = tensors.get(name_of_embedding)
    if embedding is None:
        refuse_wrapped(tensors, _wanted(shape, config, path), where=f"{role} folder {path}")
        raise UserError(
            f"{role} folder {path} has no tensor {name_of_embedding}",
            f"its weights are not those of a {config.get('model_type')} causal language model",
        )
    if embedding != (shape.vocab_size, shape.hidden_size):
        raise UserError(
            f"{role} folder {path}: the embedding is {list(embedding)},"
            f" config.json says {[shape.vocab_size, shape.hidden_size]}",
            "weights and config.json are of two different models",
        )
    _require_all_tensors(stored, shape, config, path)
    if (path / "tokenizer.json").is_file():
        largest = max(vocabulary(path, role).values())
        if largest >= shape.vocab_size:
            raise UserError(
                f"{role} folder {path}: the tokenizer has the id {largest:,}, the embedding {shape.vocab_size:,} rows",
                "resize the embedding (resize_token_embeddings) and save the model again",
            )
        require_all_tokens(path, role)
    return ModelFolder(
        path=path,
        name=name,
        origin=origin,
        config=config,
        shape=shape,
        tensors=tensors,
        weight_files=tuple(sorted({tensor.path for tensor in stored.values()})),
    )


def _require_all_tensors(
    stored: Mapping[str, StoredTensor], shape: Shape, config: Mapping[str, Any], path: Path
) -> None:
    """transformers fills a tensor that is missing with random numbers; here the folder is refused."""
    wanted = _wanted(shape, config, path)
    derived = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
    if shape.tie_word_embeddings:
        derived.add("lm_head.weight")
    check_tensors({k: v for k, v in stored.items() if k not in derived}, wanted, where=str(path))


def _wanted(shape: Shape, config: Mapping[str, Any], path: Path) -> dict[str, tuple[int, ...]]:
    from edgedistill.models.architectures import architecture_of, model_of, tensor_map

    if shape.layer_tensors:
        return {name: spec.shape for name, spec in model_of(config, where=str(path)).specs.items()}
    return {name: spec.shape for name, spec in tensor_map(shape, architecture_of(config, where=str(path))).items()}


def _embedding_of(config: Mapping[str, Any]) -> str:
    """The torch name of the token embedding."""
    family = DECODERS.get(str(config.get("model_type")))
    return EMBEDDING if family is None else family.embedding


def _modules(stored: dict[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The tensors under the names of a family that files write in several ways (GPT-2)."""
    from edgedistill.models.architectures import as_modules

    family = DECODERS.get(str(config.get("model_type")))
    return stored if family is None or not family.renamed else as_modules(stored, family)


def require_sound(path: Path, role: str = "model") -> None:
    """Read every weight of a folder, one at a time. UserError for NaN and infinity, and a tied head that differs."""
    from edgedistill.models.architectures import TIED_HEAD

    config = read_json(path / "config.json", what="config.json")
    stored = _modules(stored_tensors(path), config)
    if TIED_HEAD in stored and shape_from_config(config, where=str(path)).tie_word_embeddings:
        check_tied(stored, _embedding_of(config), str(path))
    require_finite_weights(path, role)


def check_tied(stored: Mapping[str, StoredTensor], embedding: str, where: str) -> None:
    """UserError where a head that is said to be the embedding has other values."""
    from edgedistill.models.architectures import TIED_HEAD
    from edgedistill.models.streaming import equal

    if embedding in stored and not equal(stored[TIED_HEAD], stored[embedding]):
        raise UserError(
            f"{where}: tie_word_embeddings is true, but {TIED_HEAD} differs from {embedding}",
            "set tie_word_embeddings to false in config.json if the model has a head of its own",
        )


def require_finite_weights(path: Path, role: str) -> None:
    """Read every weight of a folder, a few megabytes at a time. UserError for NaN and infinity, tensor named."""
    for name, tensor in stored_tensors(path).items():
        require_finite(tensor, name, where=f"{role} {path}")


def require_sound_once(folder: ModelFolder, store: Store, role: str) -> None:
    """`require_sound`, remembered in the store by the weights' hash: a large teacher is read once. UserError."""
    store.once(f"sound-{weights_sha256(folder, store)}", lambda: require_sound(folder.path, role))


def weights_sha256(folder: ModelFolder, store: Store) -> str:
    """One hash over config and weights; file hashes are remembered as `Store.hash_file` says."""
    return _config_and_files(folder.config, folder.weight_files, store)


def _config_and_files(config: dict[str, Any], files: Sequence[Path], store: Store) -> str:
    lines = [hashlib.sha256(canonical_json(config).encode()).hexdigest()]
    lines += [f"{file.name} {store.hash_file(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def require_weights(path: Path, expected: str, store: Store, *, role: str) -> None:
    """Refuse a folder whose weights are not those of the key that stands for them: of a user's folder config and
    weights (`weights_sha256`), of a trained model its safetensors (`distill.save.weights_digest`).

    Called where a stage opens the folder and again when it is done with it: between the two, and since the hash was
    taken, nobody may have written there. UserError.
    """
    given = sorted({tensor.path for tensor in stored_tensors(path).values()})
    trained = "".join(f"{file.name} {store.hash_file(file)}\n" for file in sorted(path.glob("*.safetensors")))
    if hashlib.sha256(trained.encode()).hexdigest() == expected:
        return
    if _config_and_files(read_json(path / "config.json", what="config.json"), given, store) == expected:
        return
    raise UserError(
        f"the {role}'s weights in {path} are not those that this run began with ({expected[:16]}…): they were changed",
        "leave the folder alone while it is used, and run the command again"
        " (`edgedistill store verify` says whether a folder of the store was damaged)",
    )


def require_loadable(folder: Path, role: str) -> None:
    """Let transformers read the folder's settings before any work with it. UserError for what it refuses."""
    from transformers import AutoConfig, GenerationConfig

    asked: tuple[tuple[Any, str, dict[str, Any]], ...] = (
        (AutoConfig, "config.json", {"trust_remote_code": False}),
        (GenerationConfig, "generation_config.json", {}),
    )
    for kind, name, options in asked:
        if not (folder / name).is_file():
            continue
        try:
            kind.from_pretrained(folder, local_files_only=True, **options)
        except Exception as error:  # its checks raise classes of their own, and whatever a wrong value leads to
            reason = " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:300]
            if "trust_remote_code" in str(error):
                raise _own_code(folder, role) from error
            raise UserError(
                f"{role} {folder}: transformers cannot read {name}: {reason or type(error).__name__}",
                f"replace it with the model's own {name}",
            ) from error
    if _code_of(folder) and not _native(folder):
        raise _own_code(folder, role)
    if (folder / "tokenizer.json").is_file():
        open_for_text(folder / "tokenizer.json")


def _code_of(folder: Path) -> str:
    """The Python code that config.json names (`auto_map`), as an error shows it; "" where there is none."""
    path = folder / "config.json"
    table = read_json(path, what="config.json").get("auto_map") if path.is_file() else None
    return ", ".join(sorted(map(str, table.values()))) if isinstance(table, dict) and table else ""


def _native(folder: Path) -> bool:
    """Whether transformers has every class itself that config.json names."""
    import transformers

    names = read_json(folder / "config.json", what="config.json").get("architectures")
    return all(hasattr(transformers, str(name)) for name in names if name) if isinstance(names, list) else True


def _own_code(folder: Path, role: str) -> UserError:
    return UserError(
        f"{role} {folder} needs Python code of its own ({_code_of(folder) or 'auto_map'}), which is never run here",
        "take a copy of the model whose architecture transformers has itself, or a model of another family",
    )


def folder_notes(folder: Path) -> list[str]:
    """What is left out of a model folder that a user may count on: its own code, what its tokenizer.json cuts."""
    code, cut = _code_of(folder), cut_note(folder)
    said = [f"the model's own code ({code}) is not run: transformers' classes of these names are"] if code else []
    return [*said, *([cut] if cut else [])]


def kept_tokens(teacher: Path, student: Path) -> list[int] | None:
    """The teacher's id of each of the student's tokens, by the student's id, where its vocabulary was trimmed.

    None where both have the same tokens. Raises UserError where the student's are not some of the teacher's, in order.
    """
    ours, theirs = vocabulary(teacher, "teacher"), vocabulary(student, "student")
    if ours == theirs:
        return None
    ordered = sorted(theirs.items(), key=lambda item: item[1])
    found = [ours[token] for token, _ in ordered if token in ours]
    whole = len(found) == len(ordered) and [index for _, index in ordered] == list(range(len(ordered)))
    if not whole or any(one >= other for one, other in itertools.pairwise(found)):
        require_same_tokenizer(teacher, student)
    return found


def require_same_tokenizer(teacher: Path, other: Path, *, role: str = "student") -> None:
    """Refuse a student, or a further teacher, whose tokens are not the teacher's. Padding is another matter.

    Raises UserError naming the first token that differs; `role` says what the other is.
    """
    remedy = (
        "choose a student of the teacher's family, or start it fresh or from the teacher's layers"
        if role == "student"
        else "teachers that teach together share one tokenizer: choose them of one family"
    )
    ours, theirs = vocabulary(teacher, "teacher"), vocabulary(other, role)
    if ours == theirs:
        return
    by_id = {index: token for token, index in theirs.items()}
    for token, index in sorted(ours.items(), key=lambda item: item[1]):
        found = theirs.get(token)
        if found != index:
            what = f"is {found} in the {role}'s" if found is not None else f"is not in the {role}'s"
            raise UserError(
                f"teacher and {role} do not share a tokenizer: token {token!r} has id {index} in the teacher's"
                f" and {what} (id {index} there: {by_id.get(index)!r}; {len(ours):,} against {len(theirs):,} tokens)",
                remedy,
            )
    extra = next(token for token in theirs if token not in ours)
    raise UserError(
        f"teacher and {role} do not share a tokenizer: the {role}'s token {extra!r} is not in the teacher's"
        f" ({len(ours):,} against {len(theirs):,} tokens)",
        remedy,
    )
