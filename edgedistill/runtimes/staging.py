"""The private folder that a runtime opens: configurations rebuilt, links to the weights, and nothing else.

Every artifact is read here first (guards/), whoever made it. The folder is temporary and only its owner's; it is the
process's working folder, home and place for temporary files where its bounds say so. It is removed when the process is
closed. One that was left by a killed program is known by its lock, which died with it, and is removed by the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgedistill.errors import UserError
from edgedistill.guards.allowed import REMEDY
from edgedistill.guards.genai import CONFIG, config_bytes, rebuilt_config
from edgedistill.guards.gguf import check_ggufs
from edgedistill.guards.onnx_model import OnnxModel, check_onnx
from edgedistill.guards.tokenizer import (
    CHAT_TEMPLATE,
    MAX_TEMPLATE_BYTES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    rebuilt_tokenizer_config,
)
from edgedistill.guards.transformers_folder import rebuilt_folder
from edgedistill.runtimes.bounds import HOME
from edgedistill.strict import open_regular, read_bytes

PREFIX = "edgedistill-run-"
LOCK = "lock"
CONTENT = "artifact"
ONNX_FILE = "model.onnx"
ORT_IDENTIFIER = b"ORTM"
MAX_SWEPT = 1000


class PrivateFolder:
    """A temporary folder with a lock: `content` for what is opened."""

    def __init__(self) -> None:
        _sweep(Path(tempfile.gettempdir()))
        self.root = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
        # Locked before it has its name: a lock that is seen and free is that of a program that is gone.
        unnamed = self.root / f".{LOCK}"
        self._lock = os.open(unnamed, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unnamed.rename(self.root / LOCK)
        self.content = self.root / CONTENT
        self.content.mkdir(0o700)
        (self.root / HOME).mkdir(0o700)

    def close(self) -> None:
        """Remove it; safe to call twice."""
        if self._lock < 0:
            return
        shutil.rmtree(self.root, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1


def _sweep(place: Path) -> None:
    """Remove what killed programs left: private folders of this user whose lock nobody holds."""
    with contextlib.suppress(OSError), os.scandir(place) as entries:
        left = [e.path for e in entries if e.name.startswith(PREFIX) and e.is_dir(follow_symlinks=False)]
        for path in map(Path, left[:MAX_SWEPT]):
            with contextlib.suppress(OSError):
                if path.stat().st_uid == os.getuid() and _is_abandoned(path / LOCK):
                    shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(lock: Path) -> bool:
    # One without a lock was made a moment ago: OSError.
    handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


@dataclass
class Staged:
    """An artifact as it is handed to a runtime: `path` in the private folder, and the real files behind it."""

    path: Path
    bytes: int = 0
    real: list[Path] = field(default_factory=list)
    seen: dict[Path, tuple[int, ...]] = field(default_factory=dict)

    def link(self, name: str, target: Path) -> None:
        """A file of the artifact under this name in the private folder."""
        real = target.resolve()
        status = real.stat()
        folder = self.path if self.path.is_dir() else self.path.parent
        (folder / name).symlink_to(real)
        self.bytes += status.st_size
        self.real.append(real)
        self.seen[real] = _identity(status)

    def require_unchanged(self) -> None:
        """UserError where a file is not the one that was read before the runtime opened it."""
        for path, seen in self.seen.items():
            try:
                now = _identity(path.stat())
            except OSError:
                now = ()
            if now != seen:
                raise UserError(f"{path} was changed while it was opened", "let nothing write there, and try again")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def stage(runtime: str, artifact: Path, folder: Path) -> Staged:
    """Check the artifact and lay it out in `folder`, which is empty. Raises UserError naming what is not allowed."""
    if runtime == "llama.cpp":
        return _gguf(artifact, folder)
    if runtime == "onnxruntime-genai":
        return _genai(artifact if artifact.is_dir() else artifact.parent, folder)
    if runtime == "onnxruntime":
        return _decoder(artifact, folder)
    if runtime == "transformers":
        return _transformers(artifact, folder)
    # What nothing here runs: its runtime says so.
    return Staged(artifact)


def stage_graph(path: Path, folder: Path) -> Staged:
    """One .onnx or .ort file, with its data."""
    staged = Staged(folder)
    if path.suffix == ".ort":
        # onnxruntime checks the offsets of its own format itself; only what this program has just made is opened so.
        with open_regular(path, what="graph") as file:
            if file.read(8)[4:] != ORT_IDENTIFIER:
                raise UserError(f"{path} is not a graph in onnxruntime's format", REMEDY)
        staged.link("model.ort", path)
        staged.path = folder / "model.ort"
        return staged
    _link_onnx(staged, check_onnx(path), ONNX_FILE)
    staged.path = folder / ONNX_FILE
    return staged


def _gguf(artifact: Path, folder: Path) -> Staged:
    if not artifact.is_file():
        raise UserError(f"no GGUF file {artifact}", "give the path of an existing .gguf file")
    parts = check_ggufs(artifact)
    staged = Staged(folder)
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.gguf" for i in range(len(parts))]
    if len(parts) == 1:
        names = ["model.gguf"]
    for name, part in zip(names, parts, strict=True):
        staged.link(name, part.path)
    staged.path = folder / names[0]
    return staged


def _genai(artifact: Path, folder: Path) -> Staged:
    if not (artifact / CONFIG).is_file():
        raise UserError(f"{artifact} has no {CONFIG} of a decoder", "give the folder of an onnxruntime-genai model")
    config = rebuilt_config(artifact / CONFIG)
    staged = Staged(folder)
    _write(folder, {CONFIG: config_bytes(config)})
    model = artifact / config["model"]["decoder"]["filename"]
    if not model.is_file():
        raise UserError(f"{artifact / CONFIG} names {model.name}, which is missing", "copy all files of the model")
    _link_onnx(staged, check_onnx(model), model.name)
    _link_tokenizer(staged, artifact)
    return staged


def _link_tokenizer(staged: Staged, artifact: Path) -> None:
    folder = staged.path
    if (artifact / TOKENIZER_CONFIG).is_file():
        _write(folder, {TOKENIZER_CONFIG: rebuilt_tokenizer_config(artifact / TOKENIZER_CONFIG)})
    if not (artifact / TOKENIZER).is_file():
        raise UserError(f"{artifact} has no {TOKENIZER}", "copy all files of the model")
    staged.link(TOKENIZER, artifact / TOKENIZER)
    if (artifact / CHAT_TEMPLATE).is_file():
        _write(
            folder,
            {CHAT_TEMPLATE: read_bytes(artifact / CHAT_TEMPLATE, what=CHAT_TEMPLATE, max_bytes=MAX_TEMPLATE_BYTES)},
        )


def _decoder(artifact: Path, folder: Path) -> Staged:
    """A decoder for onnxruntime alone: the graph, and genai_config.json for what the graph does not say."""
    path = artifact / ONNX_FILE if artifact.is_dir() else artifact
    if not path.is_file():
        raise UserError(f"no ONNX model {path}", f"give an .onnx file, or a folder that holds {ONNX_FILE}")
    staged = Staged(folder)
    _link_onnx(staged, check_onnx(path), ONNX_FILE)
    config = path.parent / CONFIG
    if config.is_file():
        _write(folder, {CONFIG: config_bytes(rebuilt_config(config))})
    return staged


def _link_onnx(staged: Staged, model: OnnxModel, name: str) -> None:
    taken = {name, CONFIG, TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE}
    for data in sorted(model.files):
        if data in taken:
            raise UserError(f"{model.path} has its data in {data}, which is another file", REMEDY)
        staged.link(data, model.path.parent / data)
    staged.link(name, model.path)


def _transformers(artifact: Path, folder: Path) -> Staged:
    if not artifact.is_dir():
        raise UserError(f"{artifact} is no folder", "give the folder of a quantized transformers model")
    written, weights = rebuilt_folder(artifact)
    staged = Staged(folder)
    _write(folder, written)
    for name in weights:
        staged.link(name, artifact / name)
    if (artifact / TOKENIZER).is_file():
        staged.link(TOKENIZER, artifact / TOKENIZER)
    return staged


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)
