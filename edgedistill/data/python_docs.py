"""The quickstart's text: the English of the installed Python's own documentation.

`pydoc_data.topics` (a document a topic) and the docstrings of the standard library (a document a
module), without the test packages, whose docstrings are not documentation.
"""

from __future__ import annotations

import ast
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from edgedistill.errors import UserError

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "pydoc_data"})
MIN_CHARS = 16  # shorter docstrings are names and types
# the fields of nodes that hold statements, in the order in which the grammar has them
STATEMENTS = ("body", "cases", "handlers", "orelse", "finalbody")
REPEATED_CHARS = 60  # shorter paragraphs repeat by chance


def python_docs() -> list[str]:
    """Documents of the running Python, in a fixed order; no paragraph stands in two of them."""
    seen: set[str] = set()
    documents = ["\n\n".join(fresh) for passages in _passages() if (fresh := _unseen(passages, seen))]
    if not documents:
        raise UserError(
            "this Python carries no documentation (no pydoc_data, no docstrings in its standard library)",
            "name a text with --data",
        )
    return documents


def _unseen(passages: list[str], seen: set[str]) -> list[str]:
    """Passages without the paragraphs that stood before: topics quote each other, and modules their kin."""
    fresh = []
    for passage in passages:
        kept = []
        for paragraph in inspect.cleandoc(passage).strip().split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen:
                kept.append(paragraph)
            if len(words) >= REPEATED_CHARS:
                seen.add(words)
        text = "\n\n".join(kept).strip()
        if len(text) >= MIN_CHARS:
            fresh.append(text)
    return fresh


def _passages() -> Iterator[list[str]]:
    try:
        from pydoc_data import topics
    except ImportError:  # some distributions leave pydoc_data out; the docstrings are still there
        pass
    else:
        for name in sorted(topics.topics):
            yield [topics.topics[name]]
    for path in _sources(Path(sysconfig.get_paths()["stdlib"])):
        yield _docstrings(path)


def _sources(library: Path) -> list[Path]:
    """The library's modules in the order of their names; folders that are skipped are not even walked."""
    found = []
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(library).as_posix())


def _docstrings(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules are not ours to report
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # templates and deliberately broken files are no documentation
        return []
    return [text for node in _documented(tree) if (text := ast.get_docstring(node, clean=False))]


def _documented(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """What may carry a docstring, level by level as `ast.walk` gives it, without its visits to every expression."""
    level: list[ast.AST] = [tree]
    while level:
        below: list[ast.AST] = []
        for node in level:
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield node
            for name in STATEMENTS:
                below += getattr(node, name, ())
        level = below
