"""The tokenizer of a model folder: its files, its vocabulary, and the one place that opens it.

A tokenizer.json keeps the truncation and padding that were last asked for, as transformers leaves them after ordinary
use. They are a caller's, not the model's: whoever opens it here gets the whole text, unpadded.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from edgedistill.errors import UserError
from edgedistill.strict import MAX_JSON_BYTES, json_object_of, read_bytes, read_json, shown

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# The tokens that spell a byte each where a vocabulary has no token for a text.
BYTES = frozenset(f"<0x{value:02X}>" for value in range(256))
_SAVE_AGAIN = (
    "python -c 'import sys, transformers;"
    " transformers.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1])'"
)
# Both are null where they are off. No token of a vocabulary has an object for its id.
_CUTS_OR_PADS = re.compile(rb'"(truncation|padding)"\s*:\s*\{')
CONTENTS_KEPT = 2  # a teacher's tokenizer.json and a student's

T = TypeVar("T")


class OfContent(Generic[T]):
    """What is made of a tokenizer.json, kept for the last contents that were read, by their sha256: a large vocabulary
    takes seconds. The file is read anew each time, and whoever is given the same thing again must not change it."""

    def __init__(self, make: Callable[[bytes, Path], T]) -> None:
        self._make = make
        self._kept: OrderedDict[bytes, T] = OrderedDict()

    def __call__(self, path: Path) -> T:
        return self.of(read_bytes(path, what="tokenizer.json", max_bytes=MAX_JSON_BYTES), path)

    def of(self, raw: bytes, path: Path) -> T:
        """Of bytes that were read from `path`."""
        content = hashlib.sha256(raw).digest()
        if content not in self._kept:
            made = self._make(raw, path)
            while len(self._kept) >= CONTENTS_KEPT:
                self._kept.popitem(last=False)
            self._kept[content] = made
        self._kept.move_to_end(content)
        return self._kept[content]


def tokenizer_sha256(folder: Path) -> str:
    """One hash over the tokenizer's files."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(f"{name}\n".encode())
            digest.update(tokenizer_bytes(name, (folder / name).read_bytes()))
    return digest.hexdigest()


def tokenizer_bytes(name: str, raw: bytes) -> bytes:
    """What of a tokenizer's file goes into its hash: the file, and a mark where its truncation or padding is left out.

    So that nothing is reused that was once made of texts which they had cut.
    """
    return raw + b"\nread whole\n" if name == "tokenizer.json" and _CUTS_OR_PADS.search(raw) else raw


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, byte for byte, but for truncation and padding: they are off in the copy."""
    for name in TOKENIZER_FILES:
        if not (source / name).is_file():
            continue
        raw = (source / name).read_bytes()
        if name == "tokenizer.json" and _CUTS_OR_PADS.search(raw):
            tree = read_json(source / name, what=name) | {"truncation": None, "padding": None}
            raw = json.dumps(tree, ensure_ascii=False, indent=2).encode()
        (target / name).write_bytes(raw)


def vocabulary(folder: Path, role: str = "model") -> dict[str, int]:
    """Token → id of tokenizer.json, added tokens included."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise no_tokenizer_json(folder, role)
    return dict(_vocabulary_of(path))


def _parsed(raw: bytes, path: Path) -> dict[str, Any]:
    return json_object_of(raw, path, what="tokenizer.json")


tokenizer_tree = OfContent(_parsed)  # path → the parsed tokenizer.json. UserError where it is no JSON object


def _token_ids(raw: bytes, path: Path) -> dict[str, int]:
    tree = tokenizer_tree.of(raw, path)
    try:
        table = tree["model"]["vocab"]
        known = {token: index for index, (token, _) in enumerate(table)} if isinstance(table, list) else dict(table)
        known.update({entry["content"]: entry["id"] for entry in tree.get("added_tokens") or []})
        odd = next(
            (token for token, index in known.items() if type(index) is not int or not 0 <= index < 1 << 31), None
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} has no vocabulary that can be read", "save it again with save_pretrained") from error
    if odd is not None or not known or not all(type(token) is str for token in known):
        what = f"the id of {shown(odd)} is {shown(known[odd])}" if odd is not None else "it has no tokens"
        raise UserError(f"{path} has no vocabulary that can be read: {what}", "save it again with save_pretrained")
    return known


_vocabulary_of = OfContent(_token_ids)


def no_tokenizer_json(folder: Path, role: str = "model") -> UserError:
    """What to do about a folder without tokenizer.json, by the tokenizer's files that it has."""
    cause = f"{role} folder {folder} has no tokenizer.json"
    sentence_piece = next(iter(sorted(folder.glob("*.model"))), None)
    if sentence_piece is not None:
        return UserError(
            f"{cause}, only SentencePiece's {sentence_piece.name}",
            f"make it: pip install sentencepiece && {_SAVE_AGAIN} {shlex.quote(str(folder))}",
        )
    if any((folder / name).is_file() for name in ("vocab.json", "vocab.txt")):
        return UserError(cause, f"make it from the files that are there: {_SAVE_AGAIN} {shlex.quote(str(folder))}")
    return UserError(cause, "save its fast tokenizer there with save_pretrained")


def require_all_tokens(folder: Path, role: str = "model") -> None:
    """Refuse a folder whose other files add tokens that tokenizer.json lacks. UserError.

    transformers adds them as it opens the folder; whatever goes by tokenizer.json alone, which every runtime here does,
    would read "<|im_start|>" as a dozen tokens of text.
    """
    known = vocabulary(folder, role)
    for name, said in (("tokenizer_config.json", _added_by_id), ("added_tokens.json", _added_by_token)):
        path = folder / name
        added = said(read_json(path, what=name)) if path.is_file() else {}
        other = [(token, index) for token, index in added.items() if known.get(token) != index]
        if other:
            token, index = other[0]
            has = f"has it as {known[token]}" if token in known else "does not have"
            more = f", and {len(other) - 1} more like it" if len(other) > 1 else ""
            where = shlex.quote(str(folder))
            raise UserError(
                f"{role} {folder}: {name} adds the token {shown(token)} with the id {index}, which tokenizer.json {has}"
                f"{more}: transformers would read it as one token, a runtime as other tokens",
                f"write it into tokenizer.json: {_SAVE_AGAIN} {where}",
            )


def _added_by_id(config: dict[str, Any]) -> dict[str, int]:
    """Token → id of tokenizer_config.json's `added_tokens_decoder`."""
    table = config.get("added_tokens_decoder")
    entries = table.items() if isinstance(table, dict) else ()
    return {
        str(entry["content"]): int(index)
        for index, entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and index.isdecimal()
    }


def _added_by_token(table: dict[str, Any]) -> dict[str, int]:
    """Token → id of added_tokens.json."""
    return {token: index for token, index in table.items() if type(index) is int}


def open_tokenizer(path: Path) -> Any:
    """tokenizer.json as the tokenizers library opens it, truncation and padding off.

    UserError where it cannot be opened: the library may panic, not only raise.
    """
    from tokenizers import Tokenizer

    return _opened(lambda: Tokenizer.from_file(str(path)), path)


def _opened(read: Callable[[], Any], path: Path) -> Any:
    try:
        opened = read()
        opened.no_truncation()
        opened.no_padding()
        return opened
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception, and what it raises has no class of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"{path} cannot be opened: {reason}", "save it again with save_pretrained") from error


def _opened_as_text(raw: bytes, path: Path) -> Any:
    from tokenizers import Tokenizer

    def read() -> Any:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("stream did not contain valid UTF-8") from None  # as the library says of a file
        return Tokenizer.from_str(text)

    opened = _opened(read, path)
    # text that spells a control token is text, not control
    opened.encode_special_tokens = True
    return opened


# path → as `open_tokenizer`, and what spells a special token is read as text; one for all who only encode with it.
open_for_text = OfContent(_opened_as_text)


def open_auto_tokenizer(folder: Path) -> Any:
    """A folder's tokenizer as transformers opens it, truncation and padding off; code of the folder's is never run.

    UserError where transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        opened = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its checks raise classes of their own, and whatever a wrong value leads to
        reason = " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:300]
        raise UserError(
            f"{folder}: transformers cannot open its tokenizer: {reason or type(error).__name__}",
            "save it again with save_pretrained, as a fast tokenizer",
        ) from error
    return read_whole(opened)


def read_whole(tokenizer: Any) -> Any:
    """A tokenizer of transformers with truncation and padding off."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def cut_note(folder: Path) -> str | None:
    """What a user must know of a tokenizer.json that cuts or pads; None where it does neither."""
    path = folder / "tokenizer.json"
    if not path.is_file() or not _CUTS_OR_PADS.search(path.read_bytes()):
        return None
    tree = read_json(path, what=path.name)
    truncation, padding = tree.get("truncation"), tree.get("padding")
    said = []
    if isinstance(truncation, dict):
        said.append(f"cuts texts at {shown(truncation.get('max_length'))} tokens")
    if isinstance(padding, dict):
        said.append("pads them")
    if not said:
        return None
    return (
        f"tokenizer.json {' and '.join(said)} where a program does not switch that off; here it is off, and texts are"
        " read whole"
    )
