"""The pages of docs/ that the program writes of itself: `python docs/write_reference.py`.

tests/test_docs.py holds the files in docs/ to what these functions give.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from edgedistill import errors
from edgedistill.config.recipe import Recipe, builtin_recipes, load_recipe
from edgedistill.config.targets import Target, load_targets
from edgedistill.fit.artifact import human_bytes
from edgedistill.records.figures import Figure

NOTE = "<!-- Written by `python docs/write_reference.py`. Edit what it is made of, not this page. -->"
HELP_WIDTH = 100
TYPES: dict[Any, str] = {int: "integer", float: "number", str: "text", bool: "true or false", types.NoneType: "null"}
EXIT_CODES = {
    errors.EXIT_DONE: "done",
    errors.EXIT_BUG: "a bug, or a runtime that died; what was finished is kept",
    errors.EXIT_USER: "wrong usage, recipe, target or input, a plan that cannot work, or a model too unsure for golden"
    " vectors",
    errors.EXIT_GATE: "the gate failed, or there were too few documents to tell; the reports are kept",
    errors.EXIT_LIMIT: "a finished artifact breaks a limit of its target; the bundle is kept. Speed counts only if it"
    " was measured on the target",
    errors.EXIT_HOST: "a host cannot be reached",
    errors.EXIT_INTERRUPTED: "interrupted; give the same command again to go on",
}
# A group runs this hidden command where no other is named: `bundle [RECIPE]`.
UNNAMED = "make"


def reference_pages() -> dict[str, str]:
    """File name in docs/ → its text."""
    return {"recipe-reference.md": recipe_page(), "cli.md": cli_page(), "targets.md": targets_page()}


def write_reference(folder: Path) -> list[Path]:
    """Write every page; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in reference_pages().items():
        path = folder / name
        path.write_text(text, encoding="utf-8", newline="\n")
        paths.append(path)
    return paths


def recipe_page() -> str:
    """Every field of a recipe: type and bounds, default, the built-in recipes' values, meaning."""
    lines = [
        "# Recipe reference",
        "",
        NOTE,
        "",
        "A recipe is a YAML file. Every field has a default, so a recipe says only what it changes. An unknown key is",
        "refused. `--set a.b=c` sets any field from the command line. If no recipe is named, `build`, `plan`,",
        "`distill` and `bundle` take a built-in one: `own` if a teacher, student or data is named, else `quickstart`.",
        "Their columns have a value where it differs from the default. A recipe of your own starts from the defaults.",
    ]
    names = builtin_recipes()
    for path, section, chosen in _sections(Recipe, [load_recipe(name) for name in names], ""):
        lines += ["", f"## {path or 'Top level'}", "", str(section.__doc__).strip(), ""]
        rows = [
            (
                f"`{path}.{name}`" if path else f"`{name}`",
                field_type(field),
                "required" if field.is_required() else _yaml(field.get_default()),
                *(_other_value(c, name, field) for c in chosen),
                field.description or "",
            )
            for name, field in section.model_fields.items()
            if not _is_section(field)
        ]
        lines += markdown_table(("field", "type", "default", *(f"`{name}`" for name in names), "what it is"), rows)
    return "\n".join(lines) + "\n"


def field_type(field: FieldInfo) -> str:
    """A field's type and bounds in words: `integer ≥ 1, or null`."""
    bounds = [_bound(limit) for limit in field.metadata]
    kinds = [_kind(part) for part in _parts(field.annotation)]
    kinds[0] = " ".join([kinds[0], " and ".join(filter(None, bounds))]).strip()
    return ", or ".join(kinds)


def cli_page() -> str:
    """The exit codes, and what `--help` of every command prints."""
    import typer

    from edgedistill.cli.app import app

    lines = ["# Command line", "", NOTE, "", "The exit codes, and what `--help` prints, command by command."]
    lines += [
        "",
        "## Exit codes",
        "",
        *markdown_table(("code", "meaning"), [(str(k), v) for k, v in EXIT_CODES.items()]),
    ]
    for words, text in _helps(typer.main.get_command(app)):
        lines += ["", f"## {words}", "", "```text", text.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def targets_page() -> str:
    """Every shipped profile with its figures, their basis and source."""
    targets = list(load_targets().values())
    lines = [
        "# Device profiles",
        "",
        NOTE,
        "",
        "The files are in `targets/`. `edgedistill targets show NAME` prints one, `edgedistill targets probe` drafts",
        "one of the machine it runs on, `edgedistill targets check FILE` validates one, `--target FILE.yaml` uses it.",
        "A figure's basis says how it is known: `derived` is from a data sheet or computed, and not measured.",
        "",
    ]
    rows = [
        (
            f"[{target.name}](#{target.name})",
            ", ".join(target.aliases),
            target.title,
            ", ".join(target.default_artifacts),
            f"{target.context_tokens:,}",
        )
        for target in targets
    ]
    lines += markdown_table(("name", "alias", "device", "default artifact", "context, tokens"), rows)
    for target in targets:
        lines += ["", *_target_lines(target)]
    return "\n".join(lines) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; what would break a cell is escaped."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{' --- |' * len(header)}", *lines[1:]]


def _sections(
    section: type[BaseModel], chosen: Sequence[BaseModel | None], path: str
) -> Iterator[tuple[str, type[BaseModel], Sequence[BaseModel | None]]]:
    """Path and class of a section and all sections in it, with what the built-in recipes have there.

    A list's sections stand as `path[]`; no built-in recipe has one (None).
    """
    yield path, section, chosen
    for name, field in section.model_fields.items():
        if _is_section(field):
            inner: type[BaseModel] = field.annotation  # type: ignore[assignment]
            yield from _sections(inner, [getattr(c, name) for c in chosen], f"{path}.{name}" if path else name)
        elif (listed := _listed_section(field)) is not None:
            yield from _sections(listed, [None for _ in chosen], f"{path}.{name}[]")


def _listed_section(field: FieldInfo) -> type[BaseModel] | None:
    """The class of a list's sections, where a field is such a list."""
    if get_origin(field.annotation) is not list:
        return None
    kind = get_args(field.annotation)[0]
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _other_value(chosen: BaseModel | None, name: str, field: FieldInfo) -> str:
    """What a built-in recipe says of a field where that is not the default: "auto" may stand for another value here."""
    if chosen is None or name not in chosen.model_fields_set or getattr(chosen, name) == field.get_default():
        return ""
    return _yaml(getattr(chosen, name))


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _parts(annotation: Any) -> Sequence[Any]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        values = [f"`{value}`" for value in get_args(annotation)]
        return f"one of {', '.join(values)}" if len(values) > 1 else values[0]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if get_origin(annotation) is list:
        return f"list of {_kind(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        key, value = get_args(annotation)
        return f"mapping of {_kind(key)} to {_kind(value)}"
    return TYPES[annotation]


def _bound(limit: Any) -> str:
    """A constraint of pydantic's in signs."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    for name, sign in signs.items():
        if hasattr(limit, name):
            return f"{sign} {getattr(limit, name):,}"
    if hasattr(limit, "min_length"):
        return f"of {limit.min_length} or more characters"
    return f"like `{limit.pattern}`" if hasattr(limit, "pattern") else ""


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).replace("\n...", "").strip()
    return f"`{text}`"


def _helps(root: Any) -> Iterator[tuple[str, str]]:
    """A command's words and its help, for every command that a user can call."""

    def walk(command: Any, words: str, parent: Any) -> Iterator[tuple[str, str]]:
        context = command.context_class(
            command, info_name=words.split()[-1], parent=parent, terminal_width=HELP_WIDTH, max_content_width=HELP_WIDTH
        )
        yield words, command.get_help(context)
        inner = dict(getattr(command, "commands", {}))
        unnamed = inner.pop(UNNAMED, None)
        if unnamed is not None:
            alone = unnamed.context_class(unnamed, info_name=words.split()[-1], parent=parent)
            yield f"{words} [RECIPE]", unnamed.get_help(alone)
        for name, one in inner.items():
            if not one.hidden:
                yield from walk(one, f"{words} {name}", context)

    yield from walk(root, "edgedistill", None)


def _target_lines(target: Target) -> list[str]:
    limits, bench = target.limits, target.bench
    clusters = ", ".join(f"{cluster.cores} × {cluster.name}" for cluster in target.cpu.clusters)
    figures = {
        "memory": target.memory_bytes,
        "usable memory": target.usable_memory_bytes,
        "runtime without a model": target.runtime_bytes,
        "memory bandwidth": target.bandwidth_bytes_per_s,
        **{f"compute, {name}": figure for name, figure in target.compute.items()},
        **{f"clock of {c.name}": c.clock_ghz for c in target.cpu.clusters if c.clock_ghz is not None},
    }
    lines = [f"## {target.name}", "", target.title + ".", ""]
    rows = [(what, shown_figure(figure), figure.basis, figure.source) for what, figure in figures.items()]
    lines += [*markdown_table(("figure", "value", "basis", "source"), rows), ""]
    facts = {
        "CPU": f"{target.arch}; {clusters}; {', '.join(target.cpu.isa)}",
        "GPU": target.gpu or "none named",
        "runtimes": ", ".join(target.runtimes),
        "default artifacts": ", ".join(target.default_artifacts),
        "allowed artifacts": ", ".join(target.allowed_artifacts),
        "artifacts for encoders": ", ".join(target.encoder_artifacts),
        "context": f"{target.context_tokens:,} tokens",
        "bench": f"{bench.threads} threads, {bench.prompt_tokens} prompt tokens, {bench.new_tokens} new tokens,"
        f" {bench.warmup} warm-up runs, {bench.repeats} repeats",
        "limits": "; ".join(_limits(target)),
        "why these limits": limits.rationale,
        "how such a machine is recognised": _identify(target),
    }
    lines += markdown_table(("what", "value"), list(facts.items()))
    if target.notes:
        lines += ["", *(f"- {note}" for note in target.notes)]
    return lines


def _limits(target: Target) -> Iterator[str]:
    limits = target.limits
    yield f"artifact at most {human_bytes(limits.max_artifact_bytes)}"
    yield f"memory at most {human_bytes(limits.max_memory_bytes)}"
    if limits.min_decode_tokens_per_s is not None:
        yield f"decode at least {limits.min_decode_tokens_per_s:g} tokens/s"
    if limits.max_ttft_ms is not None:
        yield f"first token within {limits.max_ttft_ms:g} ms"


def _identify(target: Target) -> str:
    conditions = target.identify.model_dump(exclude_none=True)
    return "; ".join(
        f"{name.replace('_', ' ')} {', '.join(value) if isinstance(value, list) else f'`{value}`'}"
        for name, value in conditions.items()
        if value != []
    )


def shown_figure(figure: Figure) -> str:
    """A figure with its unit, short: bytes and operations in powers of 1000."""
    if figure.unit in ("B", "B/s"):
        return human_bytes(figure.value) + figure.unit[1:]
    if figure.unit == "op/s":
        return f"{figure.value / 1e12:g} Top/s"
    return f"{figure.value:g} {figure.unit}"


if __name__ == "__main__":
    for written in write_reference(Path(__file__).parent):
        print(written)
