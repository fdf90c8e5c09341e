"""What the commands share: option types, and the few lines between an option and a function's argument."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgedistill import errors, streams
from edgedistill.cli.edge import write_out
from edgedistill.launch import is_follower
from edgedistill.progress import Progress

RecipeArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE", help="built-in or YAML file; default: quickstart, or own with --teacher, --student, --data"
    ),
]
Targets = Annotated[list[str], typer.Option("--target", "-t", help="device profile; may be given several times")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="set a field of the recipe: key.path=value")]
TeacherOption = Annotated[str | None, typer.Option("--teacher", help="folder or hub id of the large model")]
StudentOption = Annotated[str | None, typer.Option("--student", help="folder or hub id of a pretrained student")]
DataOption = Annotated[
    str | None, typer.Option("--data", help="text file, folder, .jsonl, .csv, .tsv, .parquet, or a hub id")
]
EvalData = Annotated[str | None, typer.Option("--eval-data", help="a held-out text of its own")]
Separator = Annotated[str | None, typer.Option("--document-separator", help="what ends a document in a text file")]
MinRetention = Annotated[
    float | None, typer.Option("--min-retention", help="least retention, at its interval's lower end")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="folder for bundles")]
Host = Annotated[str, typer.Option("--on", help="host to benchmark on; only 'local' so far")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on standard output")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress")]
QUIET_WORD = re.compile("--quiet|-v*qv*")
VERBOSE_WORD = re.compile("--verbose|-q*vq*")
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="more detail")]


def emit(as_json: bool, document: Any, text: str) -> None:
    """The result on standard output; of several ranks the first one prints."""
    if is_follower():
        return
    write_out(json.dumps(document, indent=2, default=str) if as_json else text)


def remark(text: str) -> None:
    """A word on how the options are taken, on standard error; not with -q."""
    if not any(QUIET_WORD.fullmatch(word) for word in sys.argv[1:]):
        print(text, file=streams.err())


def progress_of(quiet: bool, verbose: bool) -> Progress:
    """Reports as asked; of several ranks the first one reports."""
    return Progress(level=-1 if is_follower() else 0 if quiet else 2 if verbose else 1)


def asked_recipe(recipe: str | None, sets: list[str] | None, **named: Any) -> Any:
    from edgedistill.config.recipe import load_recipe

    paths = {
        "teacher": "teacher.model",
        "data": "data.source",
        "eval_data": "data.eval_data",
        "document_separator": "data.document_separator",
        "min_retention": "verify.min_retention",
    }
    values = {paths[name]: value for name, value in named.items() if name in paths and value is not None}
    if named.get("student") is not None:
        values |= {"student.model": named["student"], "student.start": "pretrained"}
    if recipe is None:
        recipe = "own" if any(named.get(name) is not None for name in ("teacher", "student", "data")) else "quickstart"
        if recipe == "own" and not is_follower():
            remark("no recipe named: using the built-in 'own' (see `edgedistill recipes show own`)")
    return load_recipe(recipe, sets or [], values=values)


def chosen_targets(names: list[str]) -> Any:
    from edgedistill.config.targets import load_target

    targets = [load_target(name) for name in names]
    for name, target in zip(names, targets, strict=True):
        if name in target.aliases and not is_follower():
            remark(f"target {name} is {target.name}")
    unique = {target.name: target for target in targets}
    return list(unique.values())


def the_store() -> Any:
    from edgedistill.store import Store
    from edgedistill.strict import local_path

    root = Store().root
    local_path(root / "records" / ("x" * 64), what="the store")  # what lies in it has names too
    there = next(place for place in (root, *root.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise errors.UserError(f"the store {root}: {there} is no folder", "name a folder in EDGEDISTILL_STORE")
    return Store(root)


def require_local(host: str) -> None:
    if host != "local":
        raise errors.HostUnreachable(f"host '{host}' cannot be reached: only 'local' is known", "leave --on out")
