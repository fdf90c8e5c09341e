"""Machines as people have them: mount points, users without a home, terminals of ASCII, files that shadow modules."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import tiny
from command import Command, refused

from edgedistill.runtimes.interpreter import module_command

# Root writes anywhere; here nobody does.
NOWHERE = "/proc/edgedistill"
QUICK = ("--quantization", "F16", "--set", "export.compare_speed=false", "--set", "export.compare_logits=false", "-q")
SHADOWS = ("resource", "queue", "secrets", "statistics", "platform", "calendar", "token", "uuid", "seccomp", "random")
NOISY = """
import logging, sys, warnings
from edgedistill import stages
from edgedistill.cli import app
def export(*_, **__):
    print("printed by a library")
    warnings.warn("warned by a library")
    logging.getLogger("library").error("logged by a library")
    sys.stderr.write("written by a library\\n")
    {then}
stages.export = export
app.main({arguments!r})
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny(tmp_path_factory.mktemp("environment") / "model", tie_word_embeddings=True))


def in_namespace(words: list[str], command: Command, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in a namespace of its own; the test is skipped where the system allows none."""
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    return subprocess.run(
        [*words, *command.arguments(*arguments)], capture_output=True, text=True, env=command.env(), cwd=command.folder
    )


def test_a_link_to_a_folder_is_that_folder(model: str, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    done = Command(tmp_path, warm=True)("export", "--student", model, *QUICK, "--out", "link")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "real").iterdir()} == {"artifact.json", "model.gguf"}
    assert (tmp_path / "link").is_symlink()
    refused(Command(tmp_path, warm=True)("export", "--student", model, *QUICK, "--out", "link"), "not an empty folder")


def test_a_mount_point_is_filled_as_it_is(model: str, tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    shell = 'mount -t tmpfs none "$0" && mkdir "$0/lost+found" && "$@" && ls "$0"'
    words = ["unshare", "-m", "sh", "-c", shell, str(tmp_path / "mounted")]
    done = in_namespace(words, Command(tmp_path), "export", "--student", model, *QUICK, "--out", "mounted")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-3:] == ["artifact.json", "lost+found", "model.gguf"]


def test_a_user_without_an_entry_or_a_home(model: str, tmp_path: Path) -> None:
    user = ["unshare", "--user", "--map-user=54321", "env", "-u", "HOME", "-u", "XDG_CACHE_HOME"]
    words = ("export", "--student", model, *QUICK, "--out")
    named = Command(tmp_path)
    done = in_namespace(user, named, *words, "named")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "named" / "artifact.json").is_file()
    refused(in_namespace([*user, "-u", "EDGEDISTILL_STORE"], named, *words, "out"), "HOME", "EDGEDISTILL_STORE")
    assert not (tmp_path / "~").exists()


def test_places_that_cannot_be_written_are_named_before_any_work(model: str, tmp_path: Path) -> None:
    command = Command(tmp_path, warm=True)
    refused(command("export", "--student", model, *QUICK, "--out", f"{NOWHERE}/out"), f"--out {NOWHERE}")
    refused(command("build", command.recipe(), "-t", "phone", "--out", NOWHERE), NOWHERE)
    elsewhere = Command(tmp_path, {"EDGEDISTILL_STORE": NOWHERE}, warm=True)
    refused(elsewhere("teacher", "cache", elsewhere.recipe(), "--teacher", model), NOWHERE)
    (tmp_path / "bundles" / "tiny-phone-arm64-high").mkdir(parents=True)
    (tmp_path / "bundles" / "tiny-phone-arm64-high" / "thesis.txt").write_text("not a bundle")
    refused(command("build", command.recipe(), "-t", "phone"), "exists and is not a bundle")
    assert not list((tmp_path / "store").glob("records/*"))


def test_a_terminal_of_ascii(model: str, tmp_path: Path) -> None:
    strange = tmp_path / "mödel ☃"
    strange.symlink_to(model)
    command = Command(tmp_path)
    plain = command.env() | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command.arguments("targets", "list"), capture_output=True, env=plain)
    assert done.returncode == 0, done.stderr
    named = command.arguments("export", "--student", str(strange), "--out", "out")
    refused(subprocess.run(named, capture_output=True, text=True, env=plain, cwd=tmp_path), "not text in this locale")


def shadows(folder: Path) -> str:
    folder.mkdir()
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(f"raise ImportError('this is no {name}')\n")
    return str(folder)


def test_modules_that_shadow_a_home_that_takes_nothing_and_a_terminal_of_latin_1(model: str, tmp_path: Path) -> None:
    """Files with the names of Python's own modules stand on PYTHONPATH and where the command is started."""
    shadow = shadows(tmp_path / "shadow")
    strange = tmp_path / "mödel ☃ [v1]"
    strange.symlink_to(model)
    terminal = {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    command = Command(
        tmp_path, {"PYTHONPATH": shadow, "HOME": "/proc", "XDG_CACHE_HOME": f"{NOWHERE}-cache", **terminal}
    )
    out = tmp_path / "öut ☃"
    done = subprocess.run(
        command.arguments("export", "--student", str(strange), *QUICK, "--out", str(out)), capture_output=True,
        cwd=shadow, env=command.env(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"\\u2603" in done.stdout and (out / "artifact.json").is_file()


def test_files_named_as_parts_of_the_builder_are_not_taken_for_them(model: str, tmp_path: Path) -> None:
    """The onnxruntime-genai builder imports its own parts by names that a user's script may have."""
    beside = tmp_path / "beside"
    beside.mkdir()
    for name in ("quantization", "builders", "loaders", "builder_config"):
        (beside / f"{name}.py").write_text(f"raise ImportError('this is no {name}')\n")
    command = Command(tmp_path, {"PYTHONPATH": str(beside)})
    done = command(
        "export", "--student", model, "--format", "onnx", "--quantization", "FP32", "--out", str(tmp_path / "out"),
        "--set", "export.compare_speed=false", "--set", "export.compare_logits=false",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_module_run_in_a_child_finds_the_standard_library_first(tmp_path: Path) -> None:
    shadow = shadows(tmp_path / "shadow")
    environment = os.environ | {"PYTHONPATH": shadow}
    done = subprocess.run(module_command("calendar", "2026", "7"), capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "July 2026" in done.stdout, done.stderr


def noisy(tmp_path: Path, then: str, *words: str) -> subprocess.CompletedProcess[str]:
    arguments = ["export", "--student", "none", *words]
    code = NOISY.format(then=then, arguments=arguments)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=Command(tmp_path).env(), cwd=tmp_path
    )


def test_what_libraries_say_is_for_those_who_ask(tmp_path: Path) -> None:
    refuse = "from edgedistill.errors import UserError; raise UserError('the cause', 'the remedy')"
    done = noisy(tmp_path, refuse)
    refused(done, "error: the cause")
    assert done.stderr == "error: the cause\n  try: the remedy\n" and done.stdout == ""
    done = noisy(tmp_path, refuse, "-v")
    assert done.stdout == ""
    for how in ("printed", "warned", "logged", "written"):
        assert f"{how} by a library" in done.stderr


def test_a_librarys_failure_is_not_called_a_bug_of_ours(tmp_path: Path) -> None:
    done = noisy(tmp_path, "import numpy; numpy.linalg.inv(numpy.zeros((2, 2)))")
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert "numpy failed on what it was given" in done.stderr and "bug in edgedistill" not in done.stderr
    assert "logged by a library" in done.stderr  # what it said before helps
    done = noisy(tmp_path, "from edgedistill.progress import Progress; Progress().step('x', 'y', 1)")
    assert done.returncode == 1 and "this is a bug in edgedistill" in done.stderr


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-"])
def test_a_process_without_standard_streams(closed: str, model: str, tmp_path: Path) -> None:
    """As a service has none. No file of the work's own takes the number of the stream and what is said."""
    command = Command(tmp_path)
    words = ("export", "--student", model, *QUICK, "--out", "out")
    script = f'exec "$@" {closed}'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *command.arguments(*words)], cwd=tmp_path, env=command.env(), capture_output=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "artifact.json").read_bytes()[:1] == b"{"
    assert b"export:" not in (tmp_path / "out" / "model.gguf").read_bytes()
    words = ("plan", "--teacher", model, "--data", "none.txt", "-t", "cpu-x86")
    done = subprocess.run(
        ["sh", "-c", script, "sh", *command.arguments(*words)], cwd=tmp_path, env=command.env(), capture_output=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 2


def test_quiet_is_quiet(tmp_path: Path) -> None:
    command = Command(tmp_path, warm=True)
    for words, said in ((("-q",), False), ((), True)):
        done = command("distill", "-t", "phone", "--teacher", "./none", *words)
        assert ("target phone is" in done.stderr and "no recipe named" in done.stderr) == said
