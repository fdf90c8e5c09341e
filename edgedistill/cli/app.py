"""The command line: parse, call the function of the same name, print.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from edgedistill import errors, streams
from edgedistill.cli import edge
from edgedistill.cli.options import (
    VERBOSE_WORD,
    DataOption,
    EvalData,
    Host,
    Json,
    MinRetention,
    Out,
    Quiet,
    RecipeArgument,
    Separator,
    Sets,
    StudentOption,
    Targets,
    TeacherOption,
    Verbose,
    asked_recipe,
    chosen_targets,
    emit,
    progress_of,
    require_local,
    the_store,
)
from edgedistill.launch import asked_world
from edgedistill.machine import waiting

SAID_LINES = 20
# Typer carries its own copy of click from 0.29 on; this is its ClickException either way.
ClickException: Any = typer.BadParameter.__mro__[2]


class FallThrough(TyperGroup):
    """A group whose own command runs where no subcommand is named: `bundle [RECIPE]` beside `bundle verify DIR`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not {"-h", "--help"} & set(args[:1]) and (not args or args[0] not in self.commands):
            args = ["make", *args]
        return super().parse_args(ctx, args)


HELP = {"help_option_names": ["-h", "--help"]}
PLAIN: dict[str, Any] = {
    "add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None, "context_settings": HELP,
}  # fmt: skip
app = typer.Typer(
    no_args_is_help=True,
    **PLAIN,
    help="Distil a large model into a small one that a device can run, and prove what it kept and how fast it is.",
)
teacher_app = typer.Typer(no_args_is_help=True, help="The teacher's signals, computed once for many runs.")
bundle_app = typer.Typer(cls=FallThrough, help="Write a bundle ([RECIPE] --target NAME), or verify one.")
targets_app = typer.Typer(no_args_is_help=True, **PLAIN, help="Device profiles.")
recipes_app = typer.Typer(no_args_is_help=True, **PLAIN, help="Recipes that ship with edgedistill.")
store_app = typer.Typer(no_args_is_help=True, **PLAIN, help="Show, check and remove the finished work that is kept.")
app.add_typer(teacher_app, name="teacher")
app.add_typer(bundle_app, name="bundle")
app.add_typer(targets_app, name="targets")
app.add_typer(recipes_app, name="recipes")
app.add_typer(store_app, name="store")


def _say_version(asked: bool) -> None:
    if asked:
        from edgedistill import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    pass


@app.command()
def build(
    target: Targets,
    recipe: RecipeArgument = None,
    sets: Sets = None,
    teacher: TeacherOption = None,
    student: StudentOption = None,
    data: DataOption = None,
    eval_data: EvalData = None,
    document_separator: Separator = None,
    min_retention: MinRetention = None,
    out: Out = Path("bundles"),
    on: Host = "local",
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """The whole flow: teacher, student, artifact, proof, speed, bundle."""
    from edgedistill import pipeline
    from edgedistill.cli import show

    require_local(on)
    asked = asked_recipe(
        recipe, sets, teacher=teacher, student=student, data=data, eval_data=eval_data,
        document_separator=document_separator, min_retention=min_retention,
    )  # fmt: skip
    try:
        trained, built = pipeline.build(
            asked, chosen_targets(target), store=the_store(), out=out, progress=progress_of(quiet, verbose)
        )
    except errors.EdgedistillError as error:
        if error.results is not None and error.results[1]:
            emit(as_json, show.built_json(*error.results), show.built_text(*error.results))
        raise
    emit(as_json, show.built_json(trained, built), show.built_text(trained, built))


@app.command()
def plan(
    target: Targets,
    recipe: RecipeArgument = None,
    sets: Sets = None,
    teacher: TeacherOption = None,
    student: StudentOption = None,
    data: DataOption = None,
    eval_data: EvalData = None,
    document_separator: Separator = None,
    min_retention: MinRetention = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """What build would do, without doing it: sizes, memory, disk, the most speed that a device allows."""
    from edgedistill import pipeline
    from edgedistill.cli import show

    asked = asked_recipe(
        recipe, sets, teacher=teacher, student=student, data=data, eval_data=eval_data,
        document_separator=document_separator, min_retention=min_retention,
    )  # fmt: skip
    result = pipeline.preflight(asked, chosen_targets(target), store=the_store(), progress=progress_of(quiet, verbose))
    emit(as_json, result.model_dump(mode="json"), show.plan_text(result, parts=verbose))


@app.command()
def distill(
    target: Targets,
    recipe: RecipeArgument = None,
    sets: Sets = None,
    teacher: TeacherOption = None,
    student: StudentOption = None,
    data: DataOption = None,
    eval_data: EvalData = None,
    document_separator: Separator = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train the student that the targets need; it stays in the store."""
    from edgedistill import pipeline
    from edgedistill.cli import show

    asked = asked_recipe(
        recipe, sets, teacher=teacher, student=student, data=data, eval_data=eval_data,
        document_separator=document_separator,
    )  # fmt: skip
    trained = pipeline.distill(asked, chosen_targets(target), store=the_store(), progress=progress_of(quiet, verbose))
    emit(as_json, show.trained_json(trained), show.trained_text(trained))


@teacher_app.command("cache")
def teacher_cache(
    recipe: RecipeArgument = None,
    sets: Sets = None,
    teacher: TeacherOption = None,
    data: DataOption = None,
    eval_data: EvalData = None,
    document_separator: Separator = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the teacher over the text once and keep its signals, for runs with distill.teacher_signals=cached."""
    from edgedistill import pipeline
    from edgedistill.cli import show

    asked = asked_recipe(
        recipe, sets, teacher=teacher, data=data, eval_data=eval_data, document_separator=document_separator
    )
    place, made = pipeline.cache_teacher(asked, store=the_store(), progress=progress_of(quiet, verbose))
    emit(as_json, made.model_dump(mode="json"), show.signals_text(place, made))


@app.command()
def export(
    student: Annotated[str, typer.Option("--student", help="folder or hub id of the model to export")],
    format_: Annotated[str, typer.Option("--format", help="gguf, onnx, bitsandbytes or executorch")] = "gguf",
    quantization: Annotated[str, typer.Option("--quantization", help="e.g. Q4_K_M, Q8_0, F16; INT4, INT8")] = "F16",
    context_tokens: Annotated[
        int | None, typer.Option(min=8, max=1 << 30, help="context of the artifact; default: the model's")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option("--calibration", help="text or inputs for importance matrices and static INT8")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="task of a non-decoder model; default: by its config.json")
    ] = None,
    converter: Annotated[
        Path | None,
        typer.Option("--converter", help="llama.cpp's convert_hf_to_gguf.py, for other families"),
    ] = None,
    sets: Sets = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write; must be new or empty")] = Path("exported"),
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Export a finished model as it is, without distilling, and check that its runtime opens it."""
    from edgedistill import stages
    from edgedistill.cli import show

    made = stages.export(
        student, format_=format_, quantization=quantization, context_tokens=context_tokens, out=out, store=the_store(),
        recipe=asked_recipe("own", sets), calibration=calibration, converter=converter, task=task,
        progress=progress_of(quiet, verbose),
    )  # fmt: skip
    emit(as_json, made.model_dump(mode="json"), show.artifact_text(made, out))


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="folder that `export` wrote")],
    student: Annotated[str, typer.Option("--student", help="the model that the artifact was made from")],
    data: Annotated[str, typer.Option("--data", help="held-out text")],
    teacher: Annotated[str | None, typer.Option("--teacher", help="default: the student is its own teacher")] = None,
    document_separator: Separator = None,
    sets: Sets = None,
    min_retention: MinRetention = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure what an exported artifact kept, on a text; exit code 3 if the gate fails or cannot tell."""
    from edgedistill import stages
    from edgedistill.cli import show
    from edgedistill.verify.stage import require_gate

    asked = asked_recipe("own", sets, data=data, document_separator=document_separator, min_retention=min_retention)
    retention, reports = stages.verify(
        artifact,
        student=student,
        teacher=teacher,
        recipe=asked,
        store=the_store(),
        progress=progress_of(quiet, verbose),
    )
    emit(as_json, retention.model_dump(mode="json", by_alias=True), show.retention_text(retention))
    require_gate([(str(artifact), retention, reports)])


@app.command()
def bench(
    artifact: Annotated[Path, typer.Argument(help="folder that `export` wrote")],
    target: Annotated[str, typer.Option("--target", "-t", help="device profile, for its settings and bandwidth")],
    sets: Sets = None,
    on: Host = "local",
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure an exported artifact's speed and memory on this machine."""
    from edgedistill import stages
    from edgedistill.cli import show

    require_local(on)
    latency = stages.bench(
        artifact, chosen_targets([target])[0], recipe=asked_recipe("own", sets), store=the_store(),
        progress=progress_of(quiet, verbose),
    )  # fmt: skip
    emit(as_json, latency.model_dump(mode="json", by_alias=True), show.latency_text(latency))


@bundle_app.command("make")
def bundle(
    target: Targets,
    recipe: RecipeArgument = None,
    sets: Sets = None,
    teacher: TeacherOption = None,
    student: StudentOption = None,
    data: DataOption = None,
    eval_data: EvalData = None,
    document_separator: Separator = None,
    min_retention: MinRetention = None,
    out: Out = Path("bundles"),
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the bundles of a recipe; the word `make` may be left out."""
    build(
        target, recipe, sets, teacher, student, data, eval_data, document_separator, min_retention, out, "local",
        as_json, quiet, verbose,
    )  # fmt: skip


@bundle_app.command("verify")
def bundle_verify(directory: Annotated[Path, typer.Argument(help="bundle folder")], as_json: Json = False) -> None:
    """Check the hashes of a bundle and replay its golden vectors; needs only its runtime."""
    from edgedistill.bundle.check import verify_bundle
    from edgedistill.cli.show import check_text

    check = verify_bundle(directory, store=the_store())
    emit(as_json, check.model_dump(mode="json"), check_text(check))


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="bundle folder, or the reports of a failed gate")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="file to write; default: beside the bundle")] = None,
    as_json: Json = False,
) -> None:
    """Write the HTML report of a bundle: one file, which loads nothing from outside."""
    from edgedistill.bundle.report import report as write_report

    path = write_report(directory, out)
    emit(as_json, {"report": str(path)}, str(path))


@targets_app.command("list")
def targets_list(as_json: Json = False) -> None:
    """The device profiles."""
    from edgedistill.cli import show
    from edgedistill.config import target_files

    if as_json:
        from edgedistill.config import targets

        emit(as_json, [t.model_dump(mode="json") for t in targets.targets_list()], "")
    else:
        emit(as_json, None, show.targets_text(target_files.target_rows()))


@targets_app.command("show")
def targets_show(name: str, as_json: Json = False) -> None:
    """Print one profile with every figure, its basis and source."""
    from edgedistill.config import targets

    found = targets.targets_show(name)
    emit(as_json, found.model_dump(mode="json"), targets.target_yaml(found))


@targets_app.command("check")
def targets_check(profile: str, as_json: Json = False) -> None:
    """Validate a profile of your own."""
    from edgedistill.config import targets

    found = targets.targets_check(profile)
    emit(as_json, {"name": found.name, "valid": True}, f"{found.name}: every field is valid")


@targets_app.command("probe")
def targets_probe(as_json: Json = False) -> None:
    """Draft a profile of this machine, with its memory bandwidth measured."""
    from edgedistill.config import targets
    from edgedistill.config.probe import targets_probe as probe

    found = probe()
    emit(as_json, found.model_dump(mode="json"), targets.target_yaml(found))


@recipes_app.command("list")
def recipes_list(as_json: Json = False) -> None:
    """The recipes that ship with edgedistill."""
    from edgedistill.cli.show import table
    from edgedistill.config.recipe import about_recipe, builtin_recipes

    names = builtin_recipes()
    emit(as_json, names, table("", ("recipe", "what it is for"), [(name, about_recipe(name)) for name in names]))


@recipes_app.command("show")
def recipes_show(recipe: RecipeArgument = "quickstart", sets: Sets = None, as_json: Json = False) -> None:
    """A recipe with every field."""
    from edgedistill.config.strict_yaml import dump_yaml

    document = asked_recipe(recipe, sets).model_dump(mode="json")
    emit(as_json, document, dump_yaml(document).rstrip())


@store_app.command("list")
def store_list(as_json: Json = False) -> None:
    """Finished records and unfinished work."""
    from edgedistill.cli import show
    from edgedistill.cli import store_commands as module

    rows = module.store_list(the_store())
    emit(as_json, rows, show.store_text(rows))


@store_app.command("verify")
def store_verify(as_json: Json = False) -> None:
    """Hash every file of every record again."""
    from edgedistill.cli import store_commands as module

    problems = module.store_verify(the_store())
    emit(as_json, {"problems": problems}, "\n".join(problems) or "every record is whole")
    if problems:
        raise errors.UserError(
            f"{len(problems)} problem(s) in the store", "remove what is damaged: edgedistill store prune"
        )


@store_app.command("adopt")
def store_adopt(as_json: Json = False) -> None:
    """Keep finished teachers and students across an upgrade of the libraries that made them."""
    from edgedistill.cli import store_commands as module

    adopted = module.store_adopt(the_store())
    lines = [f"{row['stage']} {row['from'][:12]} is kept as {row['to'][:12]}" for row in adopted]
    emit(as_json, {"adopted": adopted}, "\n".join(lines) or "nothing to adopt")


@store_app.command("prune")
def store_prune(
    stage: Annotated[str | None, typer.Option(help="only this stage's records")] = None,
    older_than_days: Annotated[float | None, typer.Option(help="only records older than this")] = None,
    everything: Annotated[bool, typer.Option("--all", help="all that is in the store and is not being built")] = False,
    as_json: Json = False,
) -> None:
    """Remove damaged records and what the options choose, except what is being built."""
    from edgedistill.cli import store_commands as module

    module.require_stage(stage)
    removed = module.store_prune(the_store(), stage=stage, older_than_days=older_than_days, everything=everything)
    emit(as_json, {"removed": removed}, "\n".join(removed) or "nothing to remove")


@app.command()
def doctor(
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="only this target; default: all")] = None,
    as_json: Json = False,
) -> None:
    """What this machine can and cannot do for each target, and how to get what is missing."""
    from edgedistill.cli import show
    from edgedistill.plan import doctor as module

    found = module.doctor(chosen_targets(target) if target else None, store=the_store())
    emit(as_json, found, show.doctor_text(found))


@app.command()
def version(as_json: Json = False) -> None:
    """The version of edgedistill."""
    from edgedistill import __version__

    emit(as_json, {"version": __version__}, __version__)


# Called by themselves: making every other command's options takes a quarter of the time of `targets list`.
QUICK_GROUPS = {"targets": targets_app, "recipes": recipes_app, "store": store_app}


def main(arguments: list[str] | None = None) -> None:
    """Run a command. Of several ranks each one ends at once: a process group that is not taken down aborts Python."""
    try:
        alone = asked_world() == 1
    except errors.UserError as error:
        _complain(error.cause, error.remedy)
        sys.exit(error.exit_code)
    if alone:
        run(arguments)
    try:
        run(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else errors.EXIT_BUG
    except BaseException:
        traceback.print_exc()
        code = errors.EXIT_BUG
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(arguments: list[str] | None = None) -> NoReturn:
    """Run a command; every expected error ends here, with its exit code and no traceback."""
    waiting.let_threads_sleep()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # plugins of other packages have no business here, and looking for them reads the metadata of every package
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it keeps a diary at home and sends it to its maker
    edge.prepare_streams()
    code = _outcome(sys.argv[1:] if arguments is None else arguments)
    try:
        sys.stdout.flush()
    except OSError as error:
        edge.drop_output()
        if not isinstance(error, BrokenPipeError):
            _complain(f"the result cannot be written to standard output: {error.strerror}", "name another place for it")
            code = code or errors.EXIT_USER
    sys.exit(code)


def _outcome(arguments: list[str]) -> int:
    """Runs the command; its exit code, after what went wrong was said."""
    said: list[str] = []  # by libraries, while the command ran
    try:
        edge.require_text(arguments)
        alone = QUICK_GROUPS.get(arguments[0]) if arguments else None
        verbose = any(VERBOSE_WORD.fullmatch(word) for word in arguments)
        command = _with_libraries_aside(typer.main.get_command(app if alone is None else alone), verbose, said)
        if alone is not None:
            code = command(args=arguments[1:], prog_name=f"edgedistill {arguments[0]}", standalone_mode=False)
        else:
            code = command(args=arguments, prog_name="edgedistill", standalone_mode=False)
        if code == errors.EXIT_INTERRUPTED:  # typer gives it back for a KeyboardInterrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else errors.EXIT_DONE
    except typer.Exit as stop:
        return int(stop.exit_code)
    except SystemExit:  # typer's own answer to a reader that went away (`--help | head`)
        edge.drop_output()
        return errors.EXIT_DONE
    except ClickException as error:
        error.show()
        if hint := edge.hint(error.format_message()):
            print(f"  try: {hint}", file=sys.stderr)
        return errors.EXIT_USER
    except (KeyboardInterrupt, typer.Abort):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"\ninterrupted: {edge.after_interrupt(arguments)}", file=sys.stderr)
        return errors.EXIT_INTERRUPTED
    except errors.EdgedistillError as error:
        _complain(error.cause, error.remedy)
        return error.exit_code
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package == "edgedistill":
            return _bug(said)
        _complain(
            f"the package {package} is not installed", "pip install 'edgedistill[build]' (see `edgedistill doctor`)"
        )
        return errors.EXIT_USER
    except BrokenPipeError:
        edge.drop_output()
        return errors.EXIT_DONE
    except OSError as error:
        known = edge.of_the_system(error)
        if known is None:
            return _bug(said)
        _complain(*known)
        return errors.EXIT_USER
    except MemoryError:
        _complain(*edge.of_memory())
        return errors.EXIT_USER
    except Exception:
        return _bug(said)


def _with_libraries_aside(command: Any, verbose: bool, said: list[str]) -> Any:
    """A command, its groups' too, that runs with what libraries print set aside; `said` gets the last lines of that.

    Around the functions alone: help and what is wrong with options are for the user.
    """
    for inner in getattr(command, "commands", {}).values():
        _with_libraries_aside(inner, verbose, said)
    function = command.callback
    if function is not None and not getattr(command, "commands", None):

        @functools.wraps(function)
        def aside(*positional: Any, **named: Any) -> Any:
            with streams.libraries_aside(shown=verbose, kept=said):
                return function(*positional, **named)

        command.callback = aside
    return command


def _bug(said: list[str]) -> int:
    """An exception that nobody expected: ours, or a library's on what it was given."""
    error = sys.exception()
    for line in said[-SAID_LINES:]:
        print(edge.plain(line), file=sys.stderr)
    traceback.print_exc()
    last = list(traceback.walk_tb(None if error is None else error.__traceback__))[-1:]
    module = last[0][0].f_globals.get("__name__", "") if last else ""
    library = str(module).partition(".")[0]
    if library in ("edgedistill", "", "__main__") or library in sys.stdlib_module_names:
        print("this is a bug in edgedistill: please report it with the lines above", file=sys.stderr)
    else:
        print(
            f"{library} failed on what it was given: check the model, the data and the installation (`edgedistill"
            f" doctor`); if they are in order, please report this with the lines above",
            file=sys.stderr,
        )
    return errors.EXIT_BUG


def _complain(cause: str, remedy: str) -> None:
    try:
        several = asked_world() > 1
    except errors.UserError:
        several = False
    edge.complain(cause, remedy, f" (rank {os.environ.get('RANK', '?')})" if several else "")
