"""A Hugging Face tokenizer (tokenizer.json and its neighbours) as the metadata of a GGUF.

llama.cpp has its own code for every tokenizer that it knows and chooses by name, so what is not
recognised here is refused: a near miss gives other tokens and no error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.errors import UserError
from edgedistill.gguf.generation_keys import SAMPLING
from edgedistill.gguf.tokenizer_bpe import bpe
from edgedistill.gguf.tokenizer_files import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    GgufTokenizer,
    TokenizerFiles,
    added_ends,
    read_files,
    unknown,
)
from edgedistill.gguf.tokenizer_unigram import unigram
from edgedistill.gguf.tokenizer_wordpiece import wordpiece

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = [
    "CONTROL", "NORMAL", "UNUSED", "USER_DEFINED", "GgufTokenizer", "add_tokenizer", "added_ends",
    "general_name", "read_tokenizer", "write_vocabulary",
]  # fmt: skip

PHI3 = re.compile("phi-?3", re.IGNORECASE)
KINDS: dict[str, Callable[[TokenizerFiles, Mapping[str, Any], int], GgufTokenizer]] = {
    "BPE": bpe,
    "Unigram": unigram,
    "WordPiece": wordpiece,
}


def read_tokenizer(folder: Path, *, vocab_size: int) -> GgufTokenizer:
    """The tokenizer of a transformers folder for a model with `vocab_size` embedding rows.

    Rows without a token become unused tokens `[PAD<id>]`. Raises UserError for a tokenizer that llama.cpp
    would run differently, and for a vocabulary larger than the embedding.
    """
    files = read_files(folder)
    try:
        return _read(files, vocab_size)
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        # A part of the files is of another kind than it must be. Their own library says which, where it is of these.
        from edgedistill.models.folder import open_tokenizer

        open_tokenizer(folder / "tokenizer.json")
        raise UserError(
            f"{folder}: a part of the tokenizer's settings cannot be read ({type(error).__name__}: {error})",
            "save the tokenizer again with save_pretrained",
        ) from error


def _read(files: TokenizerFiles, vocab_size: int) -> GgufTokenizer:
    model = files.tokenizer.get("model")
    if not isinstance(model, dict):
        raise unknown(files.where, "no model")
    kind = str(model.get("type", "BPE"))
    if kind not in KINDS:
        raise unknown(files.where, f"a {kind} model")
    return KINDS[kind](files, model, vocab_size)


def general_name(name: str, tokenizer: GgufTokenizer) -> str:
    """`name` as `general.name` may hold it: with "phi-3" in it where special tokens take the white space behind them,
    and only there, for llama.cpp goes by the name (and loads no model so named without Phi-3's tokens)."""
    if tokenizer.strips_right:
        return name if PHI3.search(name) else f"{name} (phi-3)"
    return PHI3.sub("phi 3", name)


def add_tokenizer(writer: GGUFWriter, tokenizer: GgufTokenizer) -> None:
    """Write the metadata that llama.cpp builds its tokenizer from."""
    writer.add_string("tokenizer.ggml.model", tokenizer.model)
    writer.add_string("tokenizer.ggml.pre", tokenizer.pre)
    writer.add_array("tokenizer.ggml.tokens", tokenizer.tokens)
    writer.add_array("tokenizer.ggml.scores", tokenizer.scores)
    writer.add_array("tokenizer.ggml.token_type", tokenizer.types)
    writer.add_array("tokenizer.ggml.merges", tokenizer.merges)
    for role, token_id in tokenizer.special.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token_id)
    writer.add_bool("tokenizer.ggml.add_bos_token", tokenizer.add_bos)
    writer.add_bool("tokenizer.ggml.add_eos_token", tokenizer.add_eos)
    writer.add_bool("tokenizer.ggml.add_space_prefix", tokenizer.add_space_prefix)
    for key, extra in tokenizer.extra.items():
        if isinstance(extra, bytes):
            writer.add_array(f"tokenizer.ggml.{key}", extra)
        else:
            writer.add_bool(f"tokenizer.ggml.{key}", extra)
    writer.add_string("tokenizer.chat_template", tokenizer.chat_template)
    if tokenizer.templates:
        writer.add_array("tokenizer.chat_templates", list(tokenizer.templates))
        for name, template in tokenizer.templates.items():
            writer.add_string(f"tokenizer.chat_template.{name}", template)
    for key, value in tokenizer.sampling.items():
        if isinstance(value, int):
            writer.add_int32(f"{SAMPLING}{key}", value)
        else:
            writer.add_float32(f"{SAMPLING}{key}", value)


def write_vocabulary(out: Path, tokenizer: GgufTokenizer) -> None:
    """A GGUF of the tokenizer alone, which llama.cpp opens where the vocabulary is all that is asked for."""
    from edgedistill.gguf.array_writer import ArrayWriter

    writer = ArrayWriter(out, "llama")
    writer.add_string("general.name", general_name("vocabulary", tokenizer))
    add_tokenizer(writer, tokenizer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
