"""The real command line: start-up, wrong input, doctor."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import Command, refused
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from edgedistill.cli.app import QUICK_GROUPS
from edgedistill.cli.edge import after_interrupt
from edgedistill.cli.show import table
from edgedistill.config.target_files import targets_folder

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "llama_cpp", "datasets", "matplotlib", "numpy")


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Command:
    made = Command(tmp_path_factory.mktemp("cli"))
    made.recipe()
    return made


@pytest.mark.parametrize("words", [["--help"], ["targets", "list"], ["build", "--help"], ["recipes", "list"]])
def test_light_commands_import_nothing_heavy(command, words):
    code = (
        "import sys; from edgedistill.cli import app as cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=command.env(), check=True
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_every_package_module_imports_without_its_heavy_libraries(command):
    """What the bundle verifier needs is importable where torch and transformers are absent."""
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'onnx', 'datasets', 'matplotlib', 'jinja2'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import edgedistill.bundle.check, edgedistill.runtimes.process, edgedistill.config.targets\n"
        "import edgedistill.plan.plan, edgedistill.pipeline, edgedistill.plan.doctor, edgedistill.config.recipe\n"
        "import edgedistill.store\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=command.env())


def test_a_missing_heavy_package_is_named(command, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError('No module named torch', name='torch')\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    lean = Command(command.folder, {"PYTHONPATH": str(tmp_path), "EDGEDISTILL_STORE": str(tmp_path / "store")})
    refused(lean("distill", lean.recipe(), "-t", "phone"), "torch is not installed", "edgedistill[build]")


def safetensors(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A small, whole teacher folder."""
    from tiny_models import tiny_checkpoint

    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture
def broken(teacher, tmp_path) -> Path:
    """A copy of the teacher to break."""
    return Path(shutil.copytree(teacher, tmp_path / "broken"))


def test_no_such_things(command):
    refused(command("build", "nosuch", "-t", "phone"), "no recipe 'nosuch'")
    refused(command("build", "quickstrat", "-t", "phone"), "did you mean 'quickstart'?")
    refused(command("build", "./missing.yaml", "-t", "phone"), "./missing.yaml")
    refused(command("build", "-t", "jetsn"), "no target 'jetsn'", "did you mean 'jetson'?")
    refused(command("build", "-t", "iphone"), "no target 'iphone': no profile of it ships", "targets show phone")
    refused(command("build", "-t", "phone", "--teacher", "./nowhere"), "no teacher ./nowhere")
    refused(command("build", "-t", "phone", "--teacher", "org/model"), "no teacher 'org/model'")
    missing = "no data file ./missing.txt"
    refused(command("build", "-t", "phone", "--data", "./missing.txt"), missing, "given with --data")
    asked = ("plan", command.recipe(), "-t", "phone", "--eval-data", "./missing.txt")
    refused(command(*asked), missing, "given with --eval-data")
    done = command("build", "-t", "phone", "--on", "pixel")
    assert done.returncode == 5
    assert "'pixel'" in done.stderr
    done = command("buidl")
    assert done.returncode == 2
    assert "build" in done.stderr


def test_what_is_near_is_named(command):
    path = Path(command.recipe())
    refused(command("plan", str(path.with_suffix(".yml")), "-t", "phone"), "no recipe", f"did you mean '{path}'?")
    for words, said in (
        (("build",), "edgedistill targets list"),
        (("build", "-t", "phone", "--quantization", "Q4_0"), "--set export.artifacts="),
    ):
        done = command(*words)
        assert done.returncode == 2 and said in done.stderr, done.stderr
    (command.folder / "manifest.json").write_text("{}")
    done = command("bundle", "verify", str(command.folder / "manifest.json"))
    assert done.returncode == 2 and f"give the folder of a bundle: {command.folder}" in done.stderr, done.stderr
    (command.folder / "manifest.json").unlink()


def test_what_an_interrupt_leaves():
    assert after_interrupt(["build", "-t", "phone"]).startswith("what was finished is kept")
    assert after_interrupt(["export", "--student", "x"]).startswith("nothing was written")


def test_wrong_recipes(command):
    recipe = command.recipe()
    refused(command("plan", recipe, "-t", "phone", "--set", "distil.tokens=3"), "did you mean 'distill'?")
    refused(command("plan", recipe, "-t", "phone", "--set", "distill.tokens=few"), "--set 'distill.tokens=few': ")
    path = command.folder / "wrong.yaml"
    path.write_text("data: {sorce: x}")
    refused(command("plan", str(path), "-t", "phone"), "unknown key 'data.sorce'", "did you mean 'source'?")
    path.write_text("data: {source: ./not_there.txt}")
    refused(command("build", str(path), "-t", "phone"), "not_there.txt")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "is empty"),
        (b"only one document, only one line", "1 document(s)"),
        (bytes(range(256)) * 20, "binary"),
        (("caf\u00e9 " * 50).encode("latin-1"), "is not UTF-8"),
        (("text " * 50).encode("utf-16"), "UTF-16"),
    ],
)
def test_wrong_data(command, tmp_path, content, cause):
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    refused(command("build", command.recipe(), "-t", "phone", "--data", str(path)), cause)


def test_model_folder_without_weights(command, broken):
    safetensors(broken).unlink()
    refused(command("build", "-t", "phone", "--teacher", str(broken)), str(broken), "no weights")


def test_truncated_safetensors(command, broken):
    file = safetensors(broken)
    os.truncate(file, file.stat().st_size - 1000)
    refused(command("build", "-t", "phone", "--teacher", str(broken)), file.name, "cut short")
    refused(command("export", "--student", str(broken), "--out", "x"), "cut short")
    assert not (command.folder / "x").exists()


def test_pickle_only(command, broken):
    safetensors(broken).rename(broken / "pytorch_model.bin")
    refused(command("export", "--student", str(broken)), "pickle", "safe_serialization")


def test_architecture_without_a_converter(command, broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    refused(command("export", "--student", str(broken)), "mamba", "llama")
    refused(command("build", "-t", "phone", "--teacher", str(broken)), "mamba", "llama")


def test_config_of_another_model(command, broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    refused(command("export", "--student", str(broken)), "embed_tokens.weight is [263, 256]")


def test_a_teacher_with_a_hole_is_refused(command, broken):
    """transformers would fill the missing tensor with random numbers."""
    from safetensors.torch import load_file, save_file

    file = safetensors(broken)
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, file)
    refused(command("build", "-t", "phone", "--teacher", str(broken)), "q_proj.weight", "missing")


def test_a_tokenizer_larger_than_the_embedding(command, broken):
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    added = {"id": 5000, "content": "<far>", "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"].append({**added, "normalized": False, "special": True})
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(command("build", "-t", "phone", "--teacher", str(broken)), "5,000", "resize")


def test_a_tokenizer_that_cannot_be_exported_is_refused_before_training(command, broken):
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(command("plan", "-t", "phone", "--teacher", str(broken)), "tokenizer.json")


def test_a_file_is_no_model(command, teacher):
    refused(command("export", "--student", str(safetensors(teacher))), "is a file")


def test_student_larger_than_its_teacher(command, teacher, tmp_path):
    from tiny_models import tiny_checkpoint

    larger = tiny_checkpoint(tmp_path / "larger", hidden=512)
    done = command(
        "build",
        "-t",
        "phone",
        "--teacher",
        str(teacher),
        "--student",
        str(larger),
        "--data",
        str(command.folder / "text.txt"),
    )
    refused(done, "more than its teacher")


def test_a_model_of_ones_own_is_not_distilled_on_text_that_nobody_named(command, teacher):
    for words in (("plan", "-t", "phone"), ("build", "-t", "phone"), ("distill", "-t", "phone"), ("teacher", "cache")):
        refused(command(*words, "--teacher", str(teacher)), "a teacher is named, and no text to distil on", "--data")
    asked = command("plan", "-t", "phone", "--teacher", str(teacher), "--data", "python-docs")
    assert asked.returncode == 0, asked.stderr


def test_target_that_cannot_hold_any_student(command, tmp_path):
    """The Pi's profile with a memory that not even the runtime fits in beside a model."""
    import yaml

    profile = yaml.safe_load((targets_folder() / "raspberry-pi-5.yaml").read_text())
    runtime = int(profile["runtime_bytes"]["value"])
    profile["name"] = "tiny-board"
    profile["aliases"] = []
    profile["memory_bytes"]["value"] = runtime + 3000
    profile["usable_memory_bytes"]["value"] = runtime + 2000
    profile["limits"]["max_memory_bytes"] = runtime + 1000
    path = tmp_path / "tiny-board.yaml"
    path.write_text(yaml.safe_dump(profile))
    refused(command("build", command.recipe(), "-t", str(path)), "tiny-board")


def test_other_tokenizer_is_refused_and_named(command, teacher, test_data):
    student = test_data / "weights" / "stories260k-hf"
    big = test_data / "weights" / "teacher-tinystories-21m"
    done = command(
        "build",
        "-t",
        "phone",
        "--teacher",
        str(big),
        "--student",
        str(student),
        "--data",
        str(command.folder / "text.txt"),
    )
    refused(done, "do not share a tokenizer", "token ")


def test_a_held_out_part_too_small_for_the_gate_is_said_before_the_work(command):
    said = "too few for the gate to tell"
    assert said not in command("plan", command.recipe(), "-t", "phone").stderr
    asked = ("plan", command.recipe(), "-t", "phone", "--set", "data.eval_share=0.02")
    done = command(*asked)
    assert done.returncode == 0 and said in done.stdout + done.stderr, done.stdout + done.stderr
    assert "documents are held out, which weigh as much as" in done.stdout + done.stderr


def test_plan_refuses_what_the_training_would(command, tmp_path):
    losses = {"forward_kl": 0, "cross_entropy": 0}
    nothing = [word for name, value in losses.items() for word in ("--set", f"distill.{name}={value}")]
    refused(command("plan", command.recipe(), "-t", "phone", *nothing), "no loss has a weight")
    for count in (1, 2):
        text = tmp_path / f"{count}.jsonl"
        text.write_text("".join(json.dumps({"text": f"document {n} " * 100}) + "\n" for n in range(count)))
        asked = (command.recipe(), "-t", "phone", "--data", str(text))
        said = f"the data holds {count} document(s); 3 are needed"
        planned = command("plan", *asked)  # what was read is listed all the same
        assert planned.returncode == 0 and f"warning: build refuses this text: {said}" in planned.stdout
        refused(command("build", *asked), said)


def test_a_remedy_does_not_ask_for_what_changes_nothing(command, teacher):
    """Sizes that are given are not made smaller by compression."""
    sizes = ("hidden_size=2048", "intermediate_size=8192", "num_hidden_layers=24")
    large = [f"{where}.shape.{size}" for where in ("student", "teacher.train") for size in sizes]
    fields = (*large, "student.compression=1", "export.artifacts=gguf:F16")
    done = command("plan", "-t", "raspberry-pi-5", *(word for said in fields for word in ("--set", said)))
    refused(done, "student.shape.hidden_size")
    assert "raise student.compression" not in done.stderr
    refused(command("store", "prune", "--stage", "teachr"), "no stage 'teachr'", "did you mean 'teacher'?")


def test_a_missing_calibration_text_is_named_with_its_option(command, teacher):
    asked = ("export", "--student", str(teacher), "--format", "gguf", "--quantization", "Q4_0", "--out", "small")
    refused(command(*asked, "--calibration", "./nope.txt"), "no data file ./nope.txt", "given with --calibration")
    assert not (command.folder / "small").exists()


def test_out_through_a_folder_that_is_not_there_is_the_folder_that_it_names(command, teacher):
    (command.folder / "mine").mkdir(exist_ok=True)
    (command.folder / "mine" / "mine.txt").write_text("precious")
    refused(command("export", "--student", str(teacher), "--out", "gone/../mine"), "not an empty folder")
    assert not (command.folder / "gone").exists()


def test_export_into_a_folder_in_use(command, teacher):
    (command.folder / "used").mkdir(exist_ok=True)
    (command.folder / "used" / "mine.txt").write_text("precious")
    refused(command("export", "--student", str(teacher), "--out", "used"), "not an empty folder")
    assert (command.folder / "used" / "mine.txt").read_text() == "precious"


def test_doctor_names_the_extra_buffers_and_every_target(command):
    found = command.json("doctor")
    assert {"llama.cpp extra buffers", "distilling", "store"} <= {c["what"] for c in found["checks"]}
    assert all(t["can_build"] for t in found["targets"])
    assert len(found["targets"]) == 7
    assert "llama.cpp extra buffers" in command("doctor", "-t", "jetson").stdout


def test_json_is_one_document_for_every_light_command(command):
    light = ["targets list", "targets show jetson", "recipes list", "recipes show", "store list", "store verify"]
    for words in [*light, f"plan {command.recipe()} -t phone", "version"]:
        command.json(*words.split())


@pytest.mark.parametrize("words", ["", "bundle", "bundle verify", "teacher", "targets list", "build"])
def test_h_is_help(command, words):
    asked = words.split()
    short, long = command(*asked, "-h"), command(*asked, "--help")
    assert short.returncode == long.returncode == 0
    assert short.stdout == long.stdout and short.stdout.startswith(f"Usage: edgedistill {words}".rstrip())


def test_version_by_option_and_by_command(command):
    assert command("--version").stdout == command("version").stdout


def test_jetson_is_an_alias_and_says_so(command):
    done = command("plan", command.recipe(), "-t", "jetson")
    assert "target jetson is jetson-orin-nano" in done.stderr


@pytest.mark.skipif(
    os.geteuid() != 0 or not sys.platform.startswith("linux"), reason="mounting a small disk needs root"
)
class TestFullDisk:
    @pytest.fixture
    def small_disk(self, tmp_path):
        place = tmp_path / "small"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
        yield place
        subprocess.run(["umount", str(place)], check=True)

    def test_plan_refuses_and_says_by_how_much(self, command, small_disk):
        full = Command(command.folder, {"EDGEDISTILL_STORE": str(small_disk / "store")})
        refused(full("build", full.recipe(), "-t", "phone"), "disk")

    def test_export_measures_the_room_first(self, command, small_disk, teacher):
        done = command(
            "export",
            "--student",
            str(teacher),
            "--format",
            "gguf",
            "--quantization",
            "F16",
            "--out",
            str(small_disk / "x"),
        )
        refused(done, "bytes, and", "free some space")
        assert not (small_disk / "x").exists()


def test_a_group_alone_says_what_it_says_among_all_commands() -> None:
    for words in (["targets"], ["targets", "show", "--help"], ["store", "prune", "--help"], ["recipes", "lisst"]):
        texts = []
        for quick in (QUICK_GROUPS, {}):
            runner = (
                f"import edgedistill.cli.app as c; c.QUICK_GROUPS = {{n: c.QUICK_GROUPS[n] for n in {list(quick)}}};"
                f" c.main({words!r})"
            )
            done = subprocess.run([sys.executable, "-c", runner], capture_output=True, text=True, timeout=60)
            texts.append((done.returncode, done.stdout, done.stderr))
        assert texts[0] == texts[1] and any(texts[0][1:]), words


def test_tables_are_richs_without_loading_it() -> None:
    rows = [["a", "日本 x", ""], ["b\nbb", "é — [bold]x[/bold]", "1"], ["", "", "12345"]]
    header = ["name", "what", "value"]
    drawn = Table(box=SIMPLE, pad_edge=False)
    for name in header:
        drawn.add_column(name, no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    buffer = io.StringIO()
    Console(file=buffer, width=200, markup=False, highlight=False, emoji=False).print(drawn)
    expected = [line.rstrip() for line in buffer.getvalue().splitlines()]
    assert table("", header, rows) == "\n".join(expected).strip("\n")
    assert table("a title", header, rows).split("\n", 2)[0] == "a title"
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from edgedistill.cli.show import table; table('', ['a'], []); "
         "print('rich' in sys.modules)"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "False\n", done.stderr
