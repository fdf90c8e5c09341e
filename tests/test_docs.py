"""README, docs/ and the packages against the program: what they show exists, and what exists is shown."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from write_reference import EXIT_CODES, reference_pages, write_reference

from edgedistill import errors
from edgedistill.cli.app import app
from edgedistill.config.recipe import Recipe, builtin_recipes, load_recipe, parse_recipe
from edgedistill.config.target_files import targets_folder
from edgedistill.config.targets import load_target, load_targets

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
FIRST_SCREEN_LINES = 60
MOST_README_LINES = 200
START = (
    "python3 -m venv .venv && .venv/bin/pip install -e '.[build]' && .venv/bin/edgedistill build --target jetson",
    "python3 -m venv .venv && .venv/bin/pip install -e '.[dev]' && .venv/bin/python -m pytest",
)
COMMANDS = (
    *("build", "plan", "distill", "teacher cache", "export", "verify", "bench", "bundle", "bundle verify", "report"),
    "doctor",
    *("targets list", "targets show", "targets check", "targets probe", "recipes list", "recipes show"),
    *("store list", "store prune", "store verify"),
)
CACHES = {"__pycache__", "results", "schemas"}


def section(title: str) -> str:
    """The text of one section of the README."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def tree() -> dict[str, str]:
    """Path → comment of the README's file tree; folders end with a slash."""
    (block,) = fenced(section("Files"), "text")
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        name, _, comment = line.strip().partition(" ")
        assert indent % 2 == 0 and indent // 2 <= len(folders), line
        folders = folders[: indent // 2]
        path = "".join(folders) + name
        assert path not in found, f"{path} stands twice"
        found[path] = comment.strip()
        if name.endswith("/"):
            folders.append(name)
    return found


def package_files() -> set[str]:
    """The files of the package that a wheel must hold."""
    found = (p for suffix in ("py", "yaml", "j2") for p in (ROOT / "edgedistill").rglob(f"*.{suffix}"))
    return {p.relative_to(ROOT).as_posix() for p in found if not CACHES & set(p.parts)}


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= MOST_README_LINES


def test_tree_has_every_folder_and_no_other() -> None:
    package = {p for p in (ROOT / "edgedistill").rglob("*") if any(p.glob("*.py"))}
    folders = {f"{p.relative_to(ROOT).as_posix()}/" for p in [ROOT / "edgedistill", *package]}
    shown = set(tree())
    missing = sorted(folders - shown)
    gone = sorted(path for path in shown if not (ROOT / path).exists())
    assert not missing and not gone, f"not in the README's tree: {missing}; not on disk: {gone}"
    assert {path for path in shown if not path.endswith("/")} == {"edgedistill/pipeline.py"}
    assert {"targets/", "tests/", "benchmarks/", "docs/"} <= shown


def test_tree_says_what_each_folder_is_and_where_to_start() -> None:
    found = tree()
    assert list(found)[:2] == ["edgedistill/", "edgedistill/pipeline.py"]
    assert found["edgedistill/pipeline.py"].startswith("START HERE")
    assert not [path for path, comment in found.items() if not comment and path != "edgedistill/"]


def test_retention_and_proxy_are_defined_before_the_table() -> None:
    before = README[: README.index("<!-- result:begin -->")]
    assert "the teacher's perplexity divided by the artifact's" in before and "1.0 is lossless" in before
    assert "**proxy**" in before


def test_tree_is_in_the_order_of_the_layers() -> None:
    """What a folder may import stands below it in the README as in the contract that CI holds."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        layers = tomllib.load(file)["tool"]["importlinter"]["contracts"][0]["layers"]
    order = [name for layer in layers for name in layer.split(" | ")]
    shown = [path.split("/")[1] for path in tree() if path.startswith("edgedistill/") and path.count("/") == 2]
    assert shown == [name for name in order if name in shown]


def test_two_commands_on_the_first_screen() -> None:
    screen = "\n".join(README.splitlines()[:FIRST_SCREEN_LINES])
    assert tuple(block.strip() for block in fenced(section("Start"), "sh")) == START
    assert section("Start").count("```") == 4
    for command in START:
        assert command in screen
        assert re.search(r"-e '\.\[(\w+)\]'", command)[1] in (ROOT / "pyproject.toml").read_text()  # type: ignore[index]


def test_result_table_on_the_first_screen() -> None:
    screen = "\n".join(README.splitlines()[:FIRST_SCREEN_LINES])
    found = re.findall(r"<!-- result:begin -->\n(.*?)<!-- result:end -->", screen, re.DOTALL)
    assert len(found) == 1 and README.count("<!-- result:begin -->") == 1
    rows = [line for line in found[0].splitlines() if line.startswith("|")]
    assert any("jetson-orin-nano" in row and re.search(r"\d\.\d+ \[", row) for row in rows), (
        "run `python benchmarks/quickstart.py --readme` on a machine that does nothing else"
    )


def test_exit_codes() -> None:
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert set(EXIT_CODES) == codes
    shown = re.findall(r"^\| (\d+) \| (.+) \|$", section("Exit codes"), re.MULTILINE)
    assert {int(code): meaning for code, meaning in shown} == EXIT_CODES


def test_environment_variables() -> None:
    source = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "edgedistill").rglob("*.py"))
    for name in set(re.findall(r"EDGEDISTILL_[A-Z_]+", source)):
        assert name in README, name


@pytest.mark.parametrize("name", sorted(reference_pages()))
def test_generated_pages(name: str) -> None:
    path = ROOT / "docs" / name
    found = path.read_text(encoding="utf-8") if path.exists() else ""
    assert found == reference_pages()[name], "run `python docs/write_reference.py`"


def test_write_reference(tmp_path: Path) -> None:
    assert {p.name for p in write_reference(tmp_path / "deep")} == set(reference_pages())


def test_every_command_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for command in COMMANDS:
        assert re.search(rf"^## edgedistill {command}$", text, re.MULTILINE), command
    assert "## edgedistill bundle [RECIPE]" in text


def test_every_recipe_field_is_described() -> None:
    text = (ROOT / "docs" / "recipe-reference.md").read_text(encoding="utf-8")

    def paths(tree: dict[str, Any], prefix: str = "") -> list[str]:
        return [
            path
            for key, value in tree.items()
            for path in (paths(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"])
        ]

    for path in paths(Recipe().model_dump()):
        row = re.search(rf"^\| `{re.escape(path)}` \|.*\| ([^|]+) \|$", text, re.MULTILINE)
        assert row and row[1].strip(), f"{path} has no description in recipe.py"


def test_every_figure_of_the_profiles_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")
    for target in load_targets().values():
        assert f"## {target.name}\n" in text
        for figure in (target.memory_bytes, target.bandwidth_bytes_per_s, *target.compute.values()):
            assert figure.source.replace("|", "\\|") in text


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub and mkdocs make it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        to = (page.parent / path) if path else page
        assert to.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", to.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{page.name}: {link}"


def test_index_names_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert pages - linked == {"index.md"} and linked <= pages


def test_site_builds_and_has_every_page(tmp_path: Path) -> None:
    """What CI runs: a page that is not in the navigation, and a link or anchor that leads nowhere, are errors."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install -e '.[dev]'")
    words = ["build", "--strict", "-f", str(ROOT / ".mkdocs.yml"), "-d", str(tmp_path / "site")]
    done = subprocess.run([sys.executable, "-m", "mkdocs", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (ROOT / "docs").rglob("*.md"):
        made = tmp_path / "site" / ("index.html" if page.stem == "index" else f"{page.stem}/index.html")
        assert made.is_file(), page.name
    assert (tmp_path / "site" / "schemas" / "edgedistill.bundle-1.json").is_file()


def messages() -> list[str]:
    """Every text of the package, with … for what is filled in."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) for part in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"

    trees = [ast.parse(p.read_text(encoding="utf-8")) for p in (ROOT / "edgedistill").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return [text(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)]


def test_the_plans_page_quotes_what_the_program_says() -> None:
    """The first column of its tables: lines that are printed, and words of refusals and warnings."""
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    first = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    quoted = [words for cell in first for words in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 30
    said = messages()
    assert not [words for words in quoted if not any(words in text for text in said)]


def shown_commands() -> list[str]:
    """Every `edgedistill …` line of the pages' blocks, fenced or indented; the generated pages are left out."""
    texts = [p.read_text(encoding="utf-8") for p in PAGES if p.name not in reference_pages()]
    lines = [line for text in texts for block in fenced(text, "sh") for line in block.splitlines()]
    lines += [line.removeprefix("    ") for text in texts for line in text.splitlines() if line.startswith("    ")]
    return [line.split("   ")[0] for line in lines if re.match(r"edgedistill \w", line)]


@pytest.mark.parametrize("line", sorted(set(shown_commands())))
def test_shown_commands_are_valid(line: str) -> None:
    words = shlex.split(line.partition(" > ")[0])[1:]
    command: Any = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    known = {option: parameter for parameter in command.params for option in parameter.opts}
    sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    for word in words:
        assert not word.startswith("-") or word in known, f"{line}: {word}"
    recipe = load_recipe(overrides=sets)
    for i, word in enumerate(words):
        if word == "--target" and not words[i + 1].endswith(".yaml"):
            target = load_target(words[i + 1])
            assert set(recipe.export.artifacts) <= set(target.allowed_artifacts), line
    required = {p.opts[0] for p in command.params if p.required and p.opts[0].startswith("-")}
    assert required <= set(words), line


def test_shown_recipes_are_valid() -> None:
    blocks = [block for page in PAGES for block in fenced(page.read_text(encoding="utf-8"), "yaml")]
    assert blocks
    for block in blocks:
        assert parse_recipe(block, where="README").model_dump() != Recipe().model_dump()


def test_ci_runs_what_the_readme_says() -> None:
    script = ROOT / ".ci" / "run"
    text = script.read_text(encoding="utf-8")
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    checks = ("ruff check", "ruff format --check", "mypy", "mkdocs build --strict")
    for words in ("set -euo pipefail", "pip install", "-e '.[dev]'", *checks):
        assert words in text
    assert text.rstrip().endswith("python -m pytest")


def test_pre_commit_needs_no_network() -> None:
    tree = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in tree["repos"]] == ["local"]
    assert {hook["language"] for repo in tree["repos"] for hook in repo["hooks"]} == {"system"}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel made from it: so both are held to."""
    for package in ("build", "hatchling"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[dev]'")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_sdist(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    profiles = {f"targets/{path.name}" for path in targets_folder().glob("*.yaml")}
    assert profiles and profiles <= names
    others = (p for top in ("targets", "tests", "benchmarks", "docs") for p in (ROOT / top).rglob("*.*") if p.is_file())
    wanted = {p.relative_to(ROOT).as_posix() for p in others if p.suffix in (".py", ".sh", ".yaml", ".md")}
    assert package_files() | wanted <= names
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml"} <= names


def test_wheel(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path)
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"edgedistill"}
    assert {f"edgedistill/_targets/{path.name}" for path in targets_folder().glob("*.yaml")} <= names
    assert package_files() <= names
    assert {"edgedistill/config/recipes/quickstart.yaml", "edgedistill/report/report.html.j2"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)

    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("-c", "import edgedistill.config.target_files as t; print(t.targets_folder())").strip()
    assert Path(where) == tmp_path / "edgedistill" / "_targets"
    listed = run("-m", "edgedistill", "targets", "list")
    for name in load_targets():
        assert name in listed
    listed = run("-m", "edgedistill", "recipes", "list").splitlines()
    assert [line.split()[0] for line in listed[2:]] == builtin_recipes()
    assert all(len(line.split()) > 5 for line in listed[2:])


@pytest.mark.parametrize("page", ["bundle.md", "store.md"])
def test_promises_name_tests_that_exist(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)((?:::\w+)+)`", text)
    assert len(named) > 20
    for file, path in named:
        (found,) = (ROOT / "tests").rglob(file)
        source = found.read_text(encoding="utf-8")
        *classes, function = path.strip(":").split("::")
        for name in classes:
            assert f"\nclass {name}" in source, (file, name)
        assert f"def {function}(" in source, (file, function)
