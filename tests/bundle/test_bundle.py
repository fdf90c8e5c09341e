"""The bundle: written whole, runs, and says which file is wrong whatever is changed in it."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attack.reseal import reseal as reseal_all
from bundle_fixtures import (
    Ingredients,
    data_result,
    latency,
    parity,
    retention,
    speed,
    student_result,
    teacher_result,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgedistill.bundle import golden_rules
from edgedistill.bundle.build import _exchange, without_folders
from edgedistill.bundle.card import digest_line
from edgedistill.bundle.check import check_sealed, verify_bundle
from edgedistill.bundle.claims import profile_notes
from edgedistill.bundle.files import read_manifest
from edgedistill.bundle.npy import load_array
from edgedistill.bundle.onnx_facts import _check_quantization, _stored, check_onnx_facts
from edgedistill.config.recipe import Recipe
from edgedistill.config.targets import load_target
from edgedistill.errors import RuntimeCrashed, UserError
from edgedistill.guards.onnx_model import check_onnx
from edgedistill.models.folder import tokenizer_sha256
from edgedistill.onnx.graph import stored_weights
from edgedistill.records.artifact import Fallback
from edgedistill.records.base import FileEntry
from edgedistill.records.manifest import (
    CARD,
    Manifest,
    manifest_bytes,
    parse_manifest,
    parse_sums,
    self_hash_holds,
    sums_text,
)
from edgedistill.records.names import collision, unsafe_path
from edgedistill.records.retention import Scored
from edgedistill.records.training import FurtherTeacher
from edgedistill.runtimes.process import RuntimeProcess
from edgedistill.store import combined_sha256, files_under, sha256_of

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ingredients(tmp_path_factory: pytest.TempPathFactory) -> Ingredients:
    return Ingredients(tmp_path_factory.mktemp("ingredients"))


@pytest.fixture(scope="module")
def made(ingredients: Ingredients, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bundle for all tests that only read."""
    return ingredients.make(tmp_path_factory.mktemp("out") / "quickstart-jetson-orin-nano")


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A bundle to be broken."""
    return Path(shutil.copytree(made, tmp_path / made.name))


def reseal(folder: Path, change: Callable[[Manifest], Manifest] = lambda m: m) -> None:
    """What a liar does: hashes of whatever lies there now, all of them right."""
    manifest = change(read_manifest(folder))

    def listed() -> list[FileEntry]:
        return [
            entry.model_copy(
                update={"bytes": (folder / entry.path).stat().st_size, "sha256": sha256_of(folder / entry.path)}
            )
            for entry in manifest.files
        ]

    student = manifest.student.model_copy(update={"tokenizer_sha256": tokenizer_sha256(folder / "preprocess")})
    changed = manifest.model_copy(update={"files": listed(), "student": student})
    card = (folder / CARD).read_text(encoding="utf-8").splitlines()
    card = [digest_line(changed) if line.startswith(DIGEST_STARTS) else line for line in card]
    (folder / CARD).write_text("\n".join(card) + "\n", encoding="utf-8", newline="\n")
    files = listed()
    changed = changed.model_copy(update={"files": files})
    (folder / "manifest.json").write_bytes(manifest_bytes(changed))
    hashes = {entry.path: entry.sha256 for entry in files} | {"manifest.json": sha256_of(folder / "manifest.json")}
    (folder / "SHA256SUMS").write_text(sums_text(hashes), encoding="utf-8", newline="\n")


DIGEST_STARTS = "sha256 of all that manifest.json says"


def reseal_card(folder: Path, change: Callable[[str], str]) -> None:
    """The card changed, its hash right, and nothing else: what it says of the manifest is as it was."""
    text = change((folder / CARD).read_text(encoding="utf-8"))
    (folder / CARD).write_text(text, encoding="utf-8", newline="\n")
    manifest = read_manifest(folder)
    entry = FileEntry(path=CARD, bytes=len(text.encode()), sha256=sha256_of(folder / CARD))
    files = [entry if one.path == CARD else one for one in manifest.files]
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest.model_copy(update={"files": files})))
    hashes = {one.path: one.sha256 for one in files} | {"manifest.json": sha256_of(folder / "manifest.json")}
    (folder / "SHA256SUMS").write_text(sums_text(hashes), encoding="utf-8", newline="\n")


def with_files(manifest: Manifest, folder: Path) -> Manifest:
    """The manifest lists what lies in preprocess/ now."""
    listed = {entry.path for entry in manifest.files}
    added = [
        FileEntry(path=path, bytes=0, sha256="0" * 64)
        for path in sorted(f"preprocess/{file.name}" for file in (folder / "preprocess").iterdir())
        if path not in listed
    ]
    files = sorted([*manifest.files, *added], key=lambda entry: entry.path)
    return manifest.model_copy(update={"files": files})


def read_or_key_error(path: Path) -> bytes:
    if not path.is_file():
        raise KeyError(path.name)
    return path.read_bytes()


def swap_two_words(path: Path) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    added = {entry["content"] for entry in tree["added_tokens"]}
    vocab = tree["model"]["vocab"]
    one, two = [token for token in vocab if token not in added][:2]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    path.write_text(json.dumps(tree), encoding="utf-8")


def refused(folder: Path, *needles: str, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        verify_bundle(folder, **{"replay": False, **options})  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    for needle in needles:
        assert needle in caught.value.cause, caught.value.cause
    return caught.value.cause


class TestWhole:
    def test_layout(self, made: Path) -> None:
        files = {p.relative_to(made).as_posix() for p in files_under(made)}
        assert {
            "manifest.json",
            "SHA256SUMS",
            "model/model.gguf",
            "preprocess/tokenizer.json",
            "preprocess/tokenizer_config.json",
            "golden/00.prompt.txt",
            "golden/00.logits.npy",
            "reports/retention.json",
            "reports/latency.json",
            "reports/report.html",
            "samples/python/run.py",
            "README.md",
            "MODEL_CARD.md",
            "LICENSE",
            "NOTICE",
            "sbom.cdx.json",
        } <= files
        assert [p.name for p in made.parent.iterdir()] == [made.name], "nothing is left beside the bundle"

    def test_the_readme_is_for_somebody_who_never_trained_a_model(self, made: Path) -> None:
        """What it says of files, types and shapes is what lies there; its check by sha256sum alone works."""
        text = (made / "README.md").read_text(encoding="utf-8")
        manifest = read_manifest(made)
        artifact = manifest.artifacts[0]
        for path in re.findall(r"`((?:golden|model|preprocess)/[\w./-]*)`", text):
            assert (made / path).exists(), path
        for name, kind, shape in re.findall(r"`(golden/[\w.-]+\.npy)`: .*?(int32|float32) \[(\d+)\]", text):
            array = np.load(made / name, allow_pickle=False)
            assert (array.dtype.name, array.shape) == (kind, (int(shape),)), name
        assert len(re.findall(r"\.npy`", text)) == 3
        assert f"{artifact.bytes:,} bytes" in text and f"at most {artifact.context_tokens:,} tokens" in text
        done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=made, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        assert "README.md: OK" in done.stdout

    def test_verifies_and_says_what_that_proves(self, made: Path, ingredients: Ingredients) -> None:
        check = verify_bundle(made, store=ingredients.store)
        assert check.files == len(list(files_under(made)))
        assert check.golden_replayed == len(read_manifest(made).artifacts[0].golden.cases) >= 3
        assert check.replays[0].largest_deviation <= check.replays[0].tolerance
        assert not check.signed
        assert any("integrity" in note and "does not prove who made it" in note for note in check.notes)

    def test_coreutils_agree(self, made: Path) -> None:
        done = subprocess.run(
            ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=made, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_same_inputs_same_bytes(self, made: Path, ingredients: Ingredients, tmp_path: Path) -> None:
        again = ingredients.make(tmp_path / made.name)
        # Rounding of a busy machine is the same rounding: every file, not only model/.
        assert (again / "SHA256SUMS").read_bytes() == (made / "SHA256SUMS").read_bytes()

    def test_no_path_of_this_machine(self, made: Path, ingredients: Ingredients) -> None:
        for path in files_under(made):
            data = path.read_bytes()
            assert str(ingredients.folder).encode() not in data, path
            assert b"/home/someone" not in data, path

    def test_no_path_of_this_machine_from_the_recipe(self, ingredients: Ingredients, tmp_path: Path) -> None:
        tree = {
            "teacher": {"model": "/home/someone/secret/big-llama"},
            "student": {"start": "pretrained", "model": "~/secret/small-llama"},
            "data": {"source": "../secret/text.jsonl", "eval_data": "/srv/secret/held.txt"},
        }
        recipe = Recipe.model_validate(tree)
        data = data_result().model_copy(update={"source": "../secret/text.jsonl (held out: /srv/secret/held.txt)"})
        folder = ingredients.make(tmp_path / "b", recipe=recipe, data=data)
        for path in files_under(folder):
            assert b"secret" not in path.read_bytes(), path
        manifest = read_manifest(folder)
        assert manifest.recipe["teacher"]["model"] == "big-llama"
        assert manifest.recipe["student"]["model"] == "small-llama"
        assert (manifest.recipe["data"]["source"], manifest.recipe["data"]["eval_data"]) == ("text.jsonl", "held.txt")
        assert manifest.data is not None
        assert manifest.data.source == "text.jsonl (held out: held.txt)"
        assert "text.jsonl" in (folder / "NOTICE").read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        ("source", "shown"),
        [
            ("python-docs", "python-docs"),
            ("org/data-set", "org/data-set"),
            ("/srv/x/text.txt", "text.txt"),
            ("~/x/text", "text"),
            ("./x/text/", "text"),
            ("x/../../y/text", "text"),
            ("private/corpus.jsonl", "corpus.jsonl"),
            ("customers/acme/texts", "texts"),
            ("tests/helpers/tiny_models.py", "tiny_models.py"),  # it exists here
            ("s3://bucket/customers/acme.jsonl", "acme.jsonl"),
            ("https://user:secret@host/x/acme.csv?token=abc", "acme.csv"),
            (".", "local files"),
            ("/", "local files"),
        ],
    )
    def test_only_local_paths_lose_their_folders(self, source: str, shown: str) -> None:
        assert without_folders(source) == shown

    def test_text_in_both_parts_is_told(self, made: Path) -> None:
        note = read_manifest(made).data
        assert note is not None
        assert (note.overlap, note.duplicates_dropped) == (data_result().overlap, 3)
        card = (made / "MODEL_CARD.md").read_text(encoding="utf-8")
        (line,) = [line for line in card.splitlines() if line.startswith("Text in both parts: ")]
        for words in ("1 held-out documents whole", "7 share a run of 13 words", "1.23%", "3 exact duplicates"):
            assert words in line
        assert "not counted" in note.model_copy(update={"overlap": {}}).in_both()

    def test_golden_vectors_are_what_the_runtime_says(self, made: Path, ingredients: Ingredients) -> None:
        manifest = read_manifest(made)
        golden = manifest.artifacts[0].golden
        assert all((made / case.prompt).read_bytes() for case in golden.cases)
        with RuntimeProcess(
            "llama.cpp", made / "model/model.gguf", threads=1, context_tokens=256, store=ingredients.store
        ) as runtime:
            for case in golden.cases:
                tokens = np.load(made / case.tokens, allow_pickle=False)
                text = (made / case.prompt).read_text(encoding="utf-8")
                assert runtime.tokenize(text, add_special=True) == tokens.tolist()
                last = runtime.logits(tokens)[-1]
                expected = np.load(made / case.logits, allow_pickle=False)
                assert np.abs(last - expected).max() <= golden.outputs[1].largest_seen + 1e-6
                assert len(np.load(made / case.greedy, allow_pickle=False)) == golden.new_tokens
        logits = golden.outputs[1]
        assert logits.scale is not None
        assert logits.tolerance == max(4 * logits.largest_seen, 0.25 * logits.scale)

    def test_works_without_the_heavy_packages(self, made: Path, ingredients: Ingredients) -> None:
        code = (
            "import sys\n"
            "banned = {'torch', 'transformers', 'tokenizers', 'jinja2', 'matplotlib', 'onnx', 'gguf',"
            " 'huggingface_hub', 'cyclonedx', 'datasets', 'safetensors'}\n"
            "class Absent:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name.partition('.')[0] in banned:\n"
            "            raise ModuleNotFoundError(name)\n"
            "sys.meta_path.insert(0, Absent())\n"
            "from pathlib import Path\n"
            "from edgedistill.bundle.check import verify_bundle\n"
            "from edgedistill.store import Store\n"
            "print(verify_bundle(Path(sys.argv[1]), store=Store(Path(sys.argv[2]))).golden_replayed)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(made), str(ingredients.store.root)],
            cwd=REPO,
            capture_output=True,
            text=True,
        )
        replayed = len(read_manifest(made).artifacts[0].golden.cases)
        assert (done.returncode, done.stdout) == (0, f"{replayed}\n"), done.stderr

    def test_missing_runtime_says_what_to_install(
        self, made: Path, ingredients: Ingredients, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "llama_cpp").mkdir()
        (tmp_path / "llama_cpp" / "__init__.py").write_text(
            "raise ModuleNotFoundError(\"No module named 'llama_cpp'\", name='llama_cpp')\n", encoding="utf-8"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("EDGEDISTILL_LLAMA_EXTRA_BUFTS", "0")
        with pytest.raises(UserError) as caught:
            verify_bundle(made, store=ingredients.store)
        assert "pip install 'edgedistill[llama]'" in caught.value.remedy

    def test_sample_runs_with_the_bundle_alone(self, made: Path, tmp_path: Path) -> None:
        before = sorted(files_under(made))
        done = subprocess.run(
            [sys.executable, str(made / "samples/python/run.py"), "Once upon", "--tokens", "8", "--threads", "1"],
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Once upon")
        assert len(done.stdout) > len("Once upon\n")
        assert "Traceback" not in done.stderr
        assert sorted(files_under(made)) == before, "running the sample must not break the sums"

    def test_sbom(self, made: Path) -> None:
        sbom = json.loads((made / "sbom.cdx.json").read_text(encoding="utf-8"))
        assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
        components = {c["name"]: c for c in sbom["components"]}
        assert components["gguf:Q4_0"]["type"] == "machine-learning-model"
        inner = components["gguf:Q4_0"]["components"][0]
        assert inner["hashes"] == [{"alg": "SHA-256", "content": sha256_of(made / "model/model.gguf")}]
        assert components["llama-cpp-python"]["scope"] == "required"
        assert "timestamp" not in sbom["metadata"]
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator

        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(sbom)) is None

    def test_manifest_describes_the_artifact(self, made: Path) -> None:
        artifact = read_manifest(made).artifacts[0]
        assert (artifact.folder, artifact.entry, artifact.format) == ("model", "model.gguf", "gguf")
        assert artifact.inputs[0].model_dump() == {"name": "tokens", "dtype": "int32", "shape": ["tokens"]}
        assert artifact.outputs[0].shape == ["tokens", artifact.vocab_size]


class TestChanged:
    def test_one_byte_of_every_file(self, copy: Path) -> None:
        random = np.random.default_rng(0)
        for path in sorted(files_under(copy)):
            name = path.relative_to(copy).as_posix()
            whole = path.read_bytes()
            places = {0, len(whole) // 2, len(whole) - 1, int(random.integers(len(whole)))}
            for place in places:
                changed = bytearray(whole)
                changed[place] ^= 1 << int(random.integers(8))
                path.write_bytes(changed)
                cause = refused(copy, name)
                if name not in ("SHA256SUMS", "manifest.json"):
                    assert f"by manifest.json, {name} was altered" in cause
                if name == "manifest.json":
                    assert "holds of itself, manifest.json was altered" in cause
            path.write_bytes(whole)
        verify_bundle(copy, replay=False)

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_byte_of_sha256sums_or_manifest(self, copy: Path, data: st.DataObject) -> None:
        path = copy / data.draw(st.sampled_from(["SHA256SUMS", "manifest.json"]))
        whole = path.read_bytes()
        place = data.draw(st.integers(0, len(whole) - 1))
        byte = data.draw(st.integers(0, 255).filter(lambda b: b != whole[place]))
        path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        try:
            cause = refused(copy, path.name)
        finally:
            path.write_bytes(whole)
        other = {"SHA256SUMS": "manifest.json was altered", "manifest.json": "SHA256SUMS was altered"}[path.name]
        assert other not in cause

    def test_every_file_removed(self, copy: Path) -> None:
        for path in sorted(files_under(copy)):
            whole = path.read_bytes()
            path.unlink()
            refused(copy, path.relative_to(copy).as_posix(), "missing")
            path.write_bytes(whole)

    @pytest.mark.parametrize("name", ["extra.txt", "model/.DS_Store", "golden/zz/deep.npy", "SHA256SUMS2", "Model.sig"])
    def test_added(self, copy: Path, name: str) -> None:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"")
        refused(copy, "golden/zz" if "deep" in name else name, "not part of the bundle")

    def test_empty_folder_added(self, copy: Path) -> None:
        (copy / "cache").mkdir()
        refused(copy, "cache")

    def test_two_files_swapped(self, copy: Path) -> None:
        one, other = copy / "golden/00.prompt.txt", copy / "golden/01.prompt.txt"
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
        refused(copy, "golden/00.prompt.txt")

    def test_truncated_and_grown_model(self, copy: Path) -> None:
        model = copy / "model/model.gguf"
        whole = model.read_bytes()
        for data in (whole[:-1], whole + b"\0", b""):
            model.write_bytes(data)
            refused(copy, "model/model.gguf", str(len(data)), str(len(whole)))

    def test_line_removed_from_sums(self, copy: Path) -> None:
        sums = copy / "SHA256SUMS"
        lines = sums.read_text(encoding="utf-8").splitlines(keepends=True)
        for number in range(len(lines)):
            sums.write_text("".join(lines[:number] + lines[number + 1 :]), encoding="utf-8")
            refused(copy, "SHA256SUMS", lines[number][66:].strip())

    def test_symlink_in_place_of_a_file(self, copy: Path, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        (copy / "NOTICE").rename(outside)
        (copy / "NOTICE").symlink_to(outside)
        refused(copy, "NOTICE", "symbolic link")

    def test_hard_link(self, copy: Path, tmp_path: Path) -> None:
        os.link(copy / "NOTICE", tmp_path / "another-name")
        refused(copy, "NOTICE", "hard link", "2 names")

    def test_sparse(self, copy: Path) -> None:
        with (copy / "NOTICE").open("r+b") as file:
            file.truncate(30 << 30)
        refused(copy, "NOTICE", str(30 << 30))
        with (copy / "NOTICE").open("r+b") as file:
            file.truncate(1 << 20)
        reseal(copy)
        refused(copy, "NOTICE", "sparse")

    def test_symlinked_folder(self, copy: Path, tmp_path: Path) -> None:
        (copy / "golden").rename(tmp_path / "elsewhere")
        (copy / "golden").symlink_to(tmp_path / "elsewhere")
        refused(copy, "golden", "symbolic link")

    def test_fifo_does_not_hang(self, copy: Path) -> None:
        os.mkfifo(copy / "reports/pipe")
        refused(copy, "reports/pipe", "special file")

    def test_a_signature_that_cannot_be_checked_is_refused(self, copy: Path) -> None:
        (copy / "model.sig").write_bytes(b"{}")
        refused(copy, "model.sig", "signatures cannot be checked by this version")
        (copy / "model.sig").unlink()
        verify_bundle(copy, replay=False)

    def test_not_a_bundle(self, tmp_path: Path) -> None:
        refused(tmp_path, "not a bundle")
        refused(tmp_path / "absent", "no folder")

    def test_huge_and_broken_manifests(self, copy: Path) -> None:
        manifest = copy / "manifest.json"
        whole = manifest.read_bytes()
        for data, needle in (
            (b"\xff\xfe" + whole, "manifest.json"),
            (b"[" * 100_000, "manifest.json"),
            (b"null\n", "manifest.json"),
            (whole.replace(b"edgedistill.bundle/1", b"edgedistill.bundle/9"), "manifest.json"),
        ):
            manifest.write_bytes(data)
            refused(copy, needle)
            # And with a SHA256SUMS that vouches for it: the manifest itself is what is wrong.
            lines = (copy / "SHA256SUMS").read_text(encoding="utf-8")
            hashes = parse_sums(lines.encode()) | {"manifest.json": sha256_of(manifest)}
            (copy / "SHA256SUMS").write_text(sums_text(hashes), encoding="utf-8")
            refused(copy, "manifest.json")
        with manifest.open("wb") as file:
            file.truncate((2 << 20) + 1)
        refused(copy, "manifest.json", "2097153")
        manifest.write_bytes(whole)
        with (copy / "SHA256SUMS").open("wb") as file:
            file.truncate((2 << 20) + 1)
        refused(copy, "SHA256SUMS", "2097153")


DEPARTURE = {"found": "runtime", "rung": "shipped", "tensor": "blk.0.attn_q", "said": "is another"}


def _low_value(tree: Any) -> None:
    """The shipped rung loses most, and its interval stays where it passes."""
    rungs, teacher = tree["rungs"], tree["rungs"][0]["perplexity"]
    rungs[3] |= {"perplexity": 100.0, "value": 100.0, "retention": teacher / 100}
    tree["retention"]["value"] = teacher / 100
    tree["neighbours"][1]["perplexity_ratio"]["value"] = 100 / rungs[2]["perplexity"]


def _another_guess(tree: Any, tokens: int) -> None:
    ratio = tokens / tree["rungs"][0]["perplexity"]
    tree["baselines"] |= {"tokens": tokens, "uniform_over_teacher": {"value": ratio, "ci95": [ratio, ratio]}}


def _more_than_uniform(tree: Any) -> None:
    ratio = 1e9 / tree["rungs"][0]["perplexity"]
    tree["baselines"] |= {"unigram_perplexity": 1e9, "unigram_over_teacher": {"value": ratio, "ci95": [ratio, ratio]}}


def _ceiling(tree: Any, count: int) -> None:
    source = tree["ceiling"]["source"].split(" ÷ ")[0]
    bandwidth = load_target("jetson").bandwidth_bytes_per_s.value
    tree["ceiling"] |= {"value": bandwidth / count, "source": f"{source} ÷ {count:,} bytes a token"}


class TestLies:
    """Bundles whose hashes are all right, and whose content is not: what replay and the manifest's checks are for."""

    @pytest.mark.parametrize(
        "name", ["README.md", "NOTICE", "MODEL_CARD.md", "LICENSE", "samples/python/run.py", "reports/report.html"]
    )
    def test_what_a_person_reads_or_runs_is_made_again(self, copy: Path, name: str) -> None:
        (copy / name).write_text(f"{(copy / name).read_text(encoding='utf-8')}\nanother\n", encoding="utf-8")
        reseal(copy)
        refused(copy, name, "is not what manifest.json and the records say")

    @pytest.mark.parametrize(
        "change",
        [
            lambda t: t.replace("\n# ", f"\n{DIGEST_STARTS} was checked by somebody: the licence is MIT\n# ", 1),
            lambda t: t.replace(DIGEST_STARTS, f"{DIGEST_STARTS}: retention 0.999 <img src=x>\u2028{DIGEST_STARTS}"),
            lambda t: t.replace(DIGEST_STARTS, f"{DIGEST_STARTS}: retention 0.999\x0c{DIGEST_STARTS}"),
            lambda t: t.replace(DIGEST_STARTS, f"| shipped | 1.000 |\r{DIGEST_STARTS}"),
            lambda t: t + t.splitlines()[-1] + "\n",
            lambda t: t.replace("published.", "published. It is the best."),
        ],
    )
    def test_the_line_of_the_cards_hash_holds_nothing_else(self, copy: Path, change: Callable[[str], str]) -> None:
        reseal_card(copy, change)
        refused(copy, CARD)

    @pytest.mark.parametrize(
        ("pattern", "by"),
        [
            (r"(<text [^>]*?)>", r'\1transform="scale(0)">'),
            (r'(<text [^>]*?) transform="[^"]*"', r"\1"),
            (r'\bd="M [^"]*"', 'd="M 0 0 L 300 300"'),
            (r'\bhref="#', 'href="https://example.org/x.svg#'),
            (r'\bhref="#[^"]*"', 'href="javascript:alert(1)"'),
            (r'viewBox="0 0 ', 'viewBox="0 200 '),
            (r'(<use [^>]*?)\by="[0-9.]+"', r'\1y="20"'),
            (r"(<svg )viewBox", r'\1width="1" viewBox'),
        ],
    )
    def test_a_plot_that_is_drawn_otherwise_is_not_the_records(self, copy: Path, pattern: str, by: str) -> None:
        path = copy / "reports/report.html"
        page = path.read_text(encoding="utf-8")
        start, end = page.index("<svg"), page.rindex("</svg>")
        drawn = re.sub(pattern, by, page[start:end])
        assert drawn != page[start:end]
        path.write_text(page[:start] + drawn + page[end:], encoding="utf-8", newline="\n")
        reseal(copy)
        refused(copy, "reports/report.html is not what manifest.json and the records say")

    def test_a_plots_last_digits_are_a_machines_own(self, copy: Path) -> None:
        path = copy / "reports/report.html"
        page = path.read_text(encoding="utf-8")
        start, end = page.index("<svg"), page.rindex("</svg>")
        drawn = re.sub(r"(?<=[ML] )(\d+)\.(\d+)", lambda found: f"{float(found[0]) + 0.003:.4f}", page[start:end])
        drawn = re.sub(r"\b(a0-\w+-[mp][0-9a-f]{10})\b", r"\1x", drawn)
        assert drawn != page[start:end]
        path.write_text(page[:start] + drawn + page[end:], encoding="utf-8", newline="\n")
        reseal(copy)
        verify_bundle(copy, replay=False)

    def test_another_version_says_that_its_documents_were_not_compared(self, copy: Path) -> None:
        (copy / "NOTICE").write_text("another\n", encoding="utf-8")
        reseal(
            copy,
            lambda m: m.model_copy(
                update={"edgedistill": "9.9", "tool_versions": {**m.tool_versions, "edgedistill": "9.9"}}
            ),
        )
        assert any("9.9" in note and "did not compare" in note for note in verify_bundle(copy, replay=False).notes)

    @pytest.mark.parametrize(
        ("path", "change", "needle"),
        [
            ("retention", lambda t: t["gate"].update(passed=False), "the checks say"),
            ("retention", lambda t: t["gate"]["checks"][0].update(value=99.0), "what was measured gives"),
            ("retention", lambda t: t["gate"]["checks"].pop(), "checks"),
            ("retention", lambda t: t["neighbours"][0]["perplexity_ratio"].update(value=1.0), "the rungs give"),
            ("retention", lambda t: t["baselines"]["unigram_over_teacher"].update(value=9.0), "word counts"),
            ("retention", lambda t: t.update(artifact="gguf:Q8_0"), "is of 'gguf:Q8_0'"),
            ("retention", lambda t: t["gate"].update(min_retention=0.1), "the recipe asks for 0.8"),
            ("retention", lambda t: t["rungs"][3].update(artifact_sha256="7" * 64), "of another shipped"),
            ("retention", lambda t: t["rungs"][0].update(artifact_sha256="7" * 64), "of another teacher"),
            ("retention", lambda t: t["retention"].update(value=0.99), "not that of the shipped rung"),
            ("retention", lambda t: t["rungs"][1].update(retention=0.99), "student rung's retention"),
            ("retention", lambda t: t["agreement"].update(top1=0.99), "agreement.top1"),
            ("retention", lambda t: t.update(documents=-3), "documents"),
            ("retention", lambda t: t["rungs"][3].update(perplexity=1e300), "nobody measures"),
            ("retention", lambda t: _low_value(t), "and its interval"),
            ("retention", lambda t: t["rungs"][1].update(kl_mean_nats_ci95=[-3.0, 1.0]), "beyond what it can be"),
            ("retention", lambda t: t["rungs"][1].update(top1_agreement_ci95=[0.5, 5.0]), "beyond what it can be"),
            ("retention", lambda t: t["rungs"][1].update(kl_p99_nats=None), "kl_p99_nats is None"),
            ("retention", lambda t: t["neighbours"][0]["kl_mean_nats"].update(ci95=[4.0, 6.0]), "kl_mean_nats is"),
            ("retention", lambda t: t["baselines"]["uniform_over_teacher"].update(ci95=[1e5, 1e6]), "baselines'"),
            ("retention", lambda t: t.update(documents=1, effective_documents=1.0), "one takes 5"),
            ("retention", lambda t: t.update(documents=9, effective_documents=9.0), "one takes 20"),
            ("retention", lambda t: t.update(effective_documents=1e9), "effective_documents"),
            ("retention", lambda t: t.update(intervals="we made them up"), "intervals are"),
            ("retention", lambda t: t.update(intervals="t-1"), "intervals are"),
            ("retention", lambda t: t.update(eval_sha256="z"), "eval_sha256"),
            ("retention", lambda t: t.update(rungs=[t["rungs"][0], t["rungs"][3]], neighbours=[]), "the rungs are"),
            ("retention", lambda t: t.update(rungs=t["rungs"][::-1]), "the rungs are"),
            ("retention", lambda t: t.update(neighbours=[]), "the neighbours are"),
            ("retention", lambda t: t["neighbours"][0].update(above="teacher"), "the neighbours are"),
            ("retention", lambda t: t.update(made_of="masters"), "quantization-aware"),
            ("retention", lambda t: t.update(kept_tokens=5), "kept_tokens"),
            ("retention", lambda t: t.update(departures=[DEPARTURE]), "departs in the runtime"),
            ("retention", lambda t: t["tokenizer"].update(texts=0), "held to 0 texts"),
            ("retention", lambda t: t.update(metric="accuracy"), "the metric is 'accuracy'"),
            ("retention", lambda t: t.update(higher_is_better=True), "the lower the better"),
            ("retention", lambda t: t["rungs"][3].update(runtime="my imagination"), "ran in 'my imagination'"),
            ("retention", lambda t: t["rungs"][0].update(kl_mean_nats=0.1, kl_mean_nats_ci95=None), "from itself"),
            ("retention", lambda t: t["rungs"][0].update(top1_agreement=0.9), "agrees for 0.9"),
            ("retention", lambda t: _another_guess(t, 10**7), "the teacher has 263"),
            ("retention", lambda t: _more_than_uniform(t), "more than a uniform guess"),
            ("retention", lambda t: t.update(context_tokens=1), "verify.context_tokens"),
            ("retention", lambda t: t.update(stride_tokens=1), "stride_tokens"),
            ("latency", lambda t: _ceiling(t, 10), "the ceiling is of 10 bytes a token"),
            ("latency", lambda t: _ceiling(t, 10**9), "the ceiling is of 1,000,000,000 bytes a token"),
            ("latency", lambda t: t.update(peak_rss_bytes=1), "peak_rss_bytes 1"),
            ("latency", lambda t: t.update(artifact_sha256="7" * 64), "of another artifact"),
            ("latency", lambda t: t.update(target="raspberry-pi-5"), "for 'raspberry-pi-5'"),
            ("latency", lambda t: t.update(decode_tokens_per_s=900.0), "its samples give"),
            ("latency", lambda t: t.update(decode_tokens_per_s_ci95=[140.0, 900.0]), "its samples give"),
            ("latency", lambda t: t.update(prefill_tokens_per_s_ci95=None), "its samples give"),
            ("latency", lambda t: t.update(rate_units=50), "over 50 repeats"),
            ("latency", lambda t: t["token_ms"].update(p50=1.0), "token_ms.p50"),
            ("latency", lambda t: t["samples"]["ttft_ms"].pop(), "are not those of 5 repeats"),
            ("latency", lambda t: t["ceiling"].update(value=1e5), "the ceiling"),
            ("latency", lambda t: t.update(basis="measured"), "says measured"),
            ("latency", lambda t: t.update(drift=1.5), "drift"),
        ],
    )
    def test_records_that_lie(self, copy: Path, path: str, change: Callable[[Any], None], needle: str) -> None:
        file = copy / f"reports/{path}.json"
        tree = json.loads(file.read_text(encoding="utf-8"))
        change(tree)
        file.write_text(json.dumps(tree), encoding="utf-8")
        reseal(copy)
        refused(copy, f"reports/{path}.json", needle)

    @pytest.mark.parametrize("text", ["perplexity: 1", "{}", "[]", '{"schema": NaN}', "[" * 100_000])
    def test_records_that_are_none(self, copy: Path, text: str) -> None:
        (copy / "reports/retention.json").write_text(text, encoding="utf-8")
        reseal(copy)
        refused(copy, "reports/retention.json")

    @pytest.mark.parametrize(
        ("change", "needle"),
        [
            ({"quantization": "Q8_0"}, "the artifact 'gguf:Q4_0' is gguf:'Q8_0'"),
            ({"bytes": 5}, "not 5"),
            ({"parameters": 7}, "parameters"),
            ({"bits_per_weight": 40.0}, "bits a weight"),
            ({"bits_per_weight": 3.0}, "bits_per_weight of gguf:Q4_0 is 3.0"),
            ({"tensor_types": {"Q4_0": 14, "Q8_0": 1, "F32": 5}}, "tensor_types of gguf:Q4_0"),
            ({"fallbacks": [Fallback(tensor="output.weight", wanted="Q4_0", got="Q8_0", why="x")]}, "the fallback of"),
            ({"context_tokens": 8}, "context"),
            ({"context_tokens": 1024}, "context"),
            ({"parity": parity(relative_rms=7.0)}, "relative_rms is 7"),
            ({"parity": parity(max_abs_difference=-5.0)}, "relative_rms"),
            ({"parity": parity(mean_abs_difference=9.0)}, "a mean of 9"),
            ({"parity": parity(greedy_compared=17, greedy_tokens_equal=17)}, "greedy tokens"),
            ({"parity": parity(greedy_tokens_equal=9)}, "9 greedy tokens are equal, of 12"),
            ({"speed": speed(ratio=50.0, ratio_ci95=(49.0, 51.0), pays=False)}, "its milliseconds give 0.5"),
            ({"speed": speed(ratio_ci95=(0.1, 0.2))}, "has an interval"),
            ({"speed": speed(pairs=2)}, "2 pairs has an interval"),
            ({"speed": speed(pays=False)}, "pays is False"),
            ({"speed": speed(float_ms=-1.0)}, "pairs of -1"),
            ({"vocab_size": 300}, "inputs and outputs"),
            ({"runtime": "onnxruntime"}, "runs no gguf"),
            ({"inputs": []}, "inputs and outputs"),
            ({"retention": "reports/latency.json"}, "retention"),
        ],
    )
    def test_claims_that_lie(self, copy: Path, change: dict[str, object], needle: str) -> None:
        reseal(copy, lambda m: m.model_copy(update={"artifacts": [m.artifacts[0].model_copy(update=change)]}))
        refused(copy, needle)

    def test_honest_parity_and_speed(self, copy: Path) -> None:
        change = {"parity": parity(), "speed": speed()}
        reseal(copy, lambda m: m.model_copy(update={"artifacts": [m.artifacts[0].model_copy(update=change)]}))
        verify_bundle(copy, replay=False)

    @pytest.mark.parametrize("family", ["qwen3", "nothing"])
    def test_another_family(self, copy: Path, family: str) -> None:
        shape = {"family": family}
        reseal(
            copy,
            lambda m: m.model_copy(
                update={"student": m.student.model_copy(update={"shape": m.student.shape.model_copy(update=shape)})}
            ),
        )
        refused(copy, "the student's family is")

    def test_a_profile_of_another_content_is_told(self, copy: Path) -> None:
        manifest = read_manifest(copy)
        assert profile_notes(manifest) == []
        other = {**manifest.target, "memory_bytes": {**manifest.target["memory_bytes"], "value": 1e12}}
        (note,) = profile_notes(manifest.model_copy(update={"target": other}))
        assert "jetson-orin-nano is not the one" in note and "memory_bytes differ" in note

    def test_a_profile_that_would_keep_the_check_busy(self, copy: Path) -> None:
        identify = {"arch": "aarch64", "machine": "(a+)+$"}
        reseal(copy, lambda m: m.model_copy(update={"target": {**m.target, "identify": identify}}))
        refused(copy, "manifest.json: target", "repeats a group")

    @pytest.mark.parametrize(
        ("change", "needle"),
        [
            (lambda t: t.clear(), "no model.vocab"),
            (lambda t: t["model"].update(vocab={}), "is empty"),
            (lambda t: t["model"]["vocab"].update(zzz=10**6), "1000000 is not below"),
            (lambda t: t["model"]["vocab"].update(zzz=-1), "-1 is not below"),
            (lambda t: t["model"]["vocab"].update(zzz=5), "different ids"),
            (lambda t: t.update(added_tokens=[{"id": 5, "content": "x"}]), "is of two tokens"),
            (lambda t: t.update(added_tokens=[{"id": "5"}]), "an added token"),
            *((lambda t, m=m: t["model"].update(merges=m), "a merge") for m in ([4], "a b", {"a": 1}, [["a"]], [None])),
        ],
    )
    def test_tokenizers_that_are_none(self, copy: Path, change: Callable[[Any], None], needle: str) -> None:
        path = copy / "preprocess/tokenizer.json"
        tree = json.loads(path.read_text(encoding="utf-8"))
        change(tree)
        path.write_text(json.dumps(tree), encoding="utf-8")
        reseal(copy)
        refused(copy, "preprocess/tokenizer.json", needle)

    @pytest.mark.parametrize(
        ("name", "tree", "needle"),
        [
            ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": "x--y.Z"}}, "auto_map asks for code"),
            ("tokenizer_config.json", {"x": [{"trust_remote_code": True}]}, "trust_remote_code asks for code"),
            ("tokenizer_config.json", {"eos_token": "a"}, "tokenizer.ggml.eos_token_id is"),
            ("tokenizer_config.json", {"eos_token": {"content": ["a"]}}, "is not a text"),
            ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": "<|eos|>"}}}, "the id 5"),
            ("tokenizer_config.json", {"chat_template": "{{ x }}"}, "'tokenizer.chat_template' is another"),
            (
                "tokenizer_config.json",
                {"chat_template": [{"name": "default", "template": "{{ x }}"}]},
                "'tokenizer.chat_template' is another",
            ),
            (
                "tokenizer_config.json",
                {"chat_template": [{"name": "tools", "template": "{{ x }}"}]},
                "'tokenizer.chat_template.tools' is another",
            ),
            ("tokenizer_config.json", {"chat_template": [5]}, "neither a text nor a list"),
            ("special_tokens_map.json", {"bos_token": "<|eos|>", "eos_token": "<|bos|>"}, "special_tokens_map.json"),
            ("added_tokens.json", {"<|eos|>": 7}, "added_tokens.json gives '<|eos|>' the id 7"),
            ("added_tokens.json", {"<|new|>": 7}, "added_tokens.json gives '<|new|>' the id 7"),
            ("vocab.json", {"a": 5}, "lists 'preprocess/vocab.json', which is not part"),
            ("tokenizer.model", {}, "lists 'preprocess/tokenizer.model', which is not part"),
        ],
    )
    def test_words_beside_the_tokenizer(self, copy: Path, name: str, tree: dict[str, object], needle: str) -> None:
        path = copy / "preprocess" / name
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.write_text(json.dumps({**before, **tree}), encoding="utf-8")
        reseal(copy, lambda m: with_files(m, copy))
        refused(copy, needle)

    def test_a_beginning_that_the_artifact_does_not_put_there(self, copy: Path) -> None:
        path = copy / "preprocess/tokenizer.json"
        tree = json.loads(path.read_text(encoding="utf-8"))
        tree["post_processor"] = {"type": "BertProcessing", "cls": ["<|bos|>", 0], "sep": ["<|eos|>", 1]}
        path.write_text(json.dumps(tree), encoding="utf-8")
        reseal(copy)
        refused(copy, "preprocess/ is not the tokenizer of gguf:Q4_0", "the post-processor adds")

    def test_a_flag_that_transformers_ignores_is_told(self, copy: Path) -> None:
        path = copy / "preprocess/tokenizer_config.json"
        tree = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**tree, "add_eos_token": True}), encoding="utf-8")
        reseal(copy)
        assert any("add_eos_token=True" in note for note in check_sealed(copy).notes)

    @pytest.mark.parametrize("place", [("machine", "cpu"), ("recipe", "seed_note"), ("machine", "os")])
    def test_a_claim_that_nothing_contradicts(self, copy: Path, place: tuple[str, str]) -> None:
        """Changed with every hash right again but the card's: what a JSON editor and sha256sum can do."""

        def lie(tree: dict[str, Any]) -> None:
            tree[place[0]][place[1]] = "a better one"

        reseal_all(copy, lie)
        refused(copy, "MODEL_CARD.md")

    @pytest.mark.parametrize("part", ["verify", "student", "distill", "export"])
    def test_a_recipe_whose_parts_are_none(self, copy: Path, part: str) -> None:
        reseal(copy, lambda m: m.model_copy(update={"recipe": {**m.recipe, part: "x"}}))
        refused(copy, f"recipe.{part}")

    @pytest.mark.parametrize("field", ["family", "max_position_embeddings", "qk_norm"])
    def test_a_field_that_is_left_out_since_it_has_a_default(self, copy: Path, field: str) -> None:
        def shorter(tree: dict[str, Any]) -> None:
            del tree["student"]["shape"][field]

        reseal_all(copy, shorter)
        refused(copy, "manifest.json is not as this version writes it")

    def test_a_string_that_is_too_long(self, copy: Path) -> None:
        reseal(copy, lambda m: m.model_copy(update={"machine": {**m.machine, "cpu": "x" * 200_000}}))
        refused(copy, "a string of 200,000 characters")

    def test_a_converter_is_no_excuse(self, copy: Path) -> None:
        def noted(manifest: Manifest) -> Manifest:
            notes = ["converted by convert_hf_to_gguf.py"]
            return manifest.model_copy(
                update={"artifacts": [manifest.artifacts[0].model_copy(update={"notes": notes})]}
            )

        def with_tool(manifest: Manifest) -> Manifest:
            return noted(manifest).model_copy(update={"tool_versions": {**manifest.tool_versions, "converter": "x.py"}})

        reseal(copy, noted)
        refused(copy, "tool_versions names no converter")
        reseal(copy, with_tool)
        swap_two_words(copy / "preprocess/tokenizer.json")
        reseal(copy)
        refused(copy, "preprocess/ is not the tokenizer of gguf:Q4_0: token")

    def test_logits_that_the_runtime_does_not_compute(self, copy: Path, ingredients: Ingredients) -> None:
        path = copy / "golden/01.logits.npy"
        values = np.load(path)
        values[7] += 1.0
        np.save(path, values)
        reseal(copy)
        refused(copy, "golden/01.logits.npy", "off by", replay=True, store=ingredients.store)

    def test_not_a_number(self, copy: Path, ingredients: Ingredients) -> None:
        path = copy / "golden/01.logits.npy"
        values = np.load(path)
        values[7] = np.nan
        np.save(path, values)
        reseal(copy)
        refused(copy, "golden/01.logits.npy", "not finite")

    def test_tokens_that_the_tokenizer_does_not_give(self, copy: Path, ingredients: Ingredients) -> None:
        (copy / "golden/00.prompt.txt").write_text("Tha", encoding="utf-8")
        reseal(copy)
        refused(copy, "golden/00.tokens.npy", replay=True, store=ingredients.store)

    def test_greedy_ids(self, copy: Path, ingredients: Ingredients) -> None:
        manifest = read_manifest(copy)
        artifact = manifest.artifacts[0]
        cases = [case.model_copy(update={"greedy_compared": 3}) for case in artifact.golden.cases]
        greedy = np.load(copy / cases[0].greedy)
        greedy[1] ^= 1
        np.save(copy / cases[0].greedy, greedy)
        golden = artifact.golden.model_copy(update={"cases": cases})
        reseal(copy, lambda m: m.model_copy(update={"artifacts": [artifact.model_copy(update={"golden": golden})]}))
        refused(copy, "golden/00.greedy.npy", replay=True, store=ingredients.store)

    def test_pickle_is_never_loaded(self, copy: Path, ingredients: Ingredients, tmp_path: Path) -> None:
        class Bomb:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.system, (f"touch {tmp_path / 'exploded'}",)

        np.save(copy / "golden/00.logits.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
        reseal(copy)
        refused(copy, "golden/00.logits.npy", replay=True, store=ingredients.store)
        assert not (tmp_path / "exploded").exists()

    def test_header_that_claims_terabytes(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npy"
        np.save(path, np.zeros(4, dtype="<f4"))
        path.write_bytes(path.read_bytes().replace(b"(4,), }          ", b"(4000000000000,),}"))
        with pytest.raises(UserError, match="4000000000000"):
            load_array(path, "<f4", (4,), what="a.npy")

    def test_model_that_no_runtime_opens(self, copy: Path, ingredients: Ingredients) -> None:
        model = copy / "model/model.gguf"
        size = model.stat().st_size
        model.write_bytes(b"GGUF" + bytes(size - 4))
        reseal_all(copy)
        with pytest.raises((UserError, RuntimeCrashed), match=r"model\.gguf"):
            verify_bundle(copy, store=ingredients.store)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("folder", "../../etc"),
            ("folder", "/etc"),
            ("entry", "../passwd"),
            ("retention", "../../x"),
            ("latency", "/x"),
        ],
    )
    def test_manifest_paths_that_leave_the_folder(self, copy: Path, field: str, value: str) -> None:
        reseal(copy, lambda m: m.model_copy(update={"artifacts": [m.artifacts[0].model_copy(update={field: value})]}))
        refused(copy, "manifest.json", value)

    def test_golden_paths_that_leave_the_folder(self, copy: Path) -> None:
        def lie(manifest: Manifest) -> Manifest:
            artifact = manifest.artifacts[0]
            case = artifact.golden.cases[0].model_copy(update={"prompt": "../../../etc/passwd"})
            golden = artifact.golden.model_copy(update={"cases": [case]})
            return manifest.model_copy(update={"artifacts": [artifact.model_copy(update={"golden": golden})]})

        reseal(copy, lie)
        refused(copy, "../../../etc/passwd")

    def test_artifact_that_is_another(self, copy: Path) -> None:
        def lie(manifest: Manifest) -> Manifest:
            artifact = manifest.artifacts[0]
            return manifest.model_copy(update={"artifacts": [artifact.model_copy(update={"sha256": "0" * 64})]})

        reseal(copy, lie)
        refused(copy, "manifest.json", "gguf:Q4_0")


class TestNames:
    @pytest.mark.parametrize(
        "path",
        [
            "", "/a", "a//b", "./a", "a/../b", "a\\b", "C:a", "a\x00b", "a\x1bb", "a\u202eb", "a\u200bb", "cafe\u0301",
            "con", "a/NUL.txt", "com1.gguf", "lpt¹", "a.", "a ", " a", "a/b./c", "a?b", "a<b", "a|b", 'a"b', "a:b",
            "a" * 256, "é" * 128, "a/" * 17 + "a", "x" * 513, "\ud800",
        ],
    )  # fmt: skip
    def test_refused(self, path: str) -> None:
        assert unsafe_path(path)

    @pytest.mark.parametrize(
        "path", ["a", "model/model.onnx.data", ".hidden", "日本/émigré.txt", "a b-c_d+e=f@g,h;i", "console"]
    )
    def test_allowed(self, path: str) -> None:
        assert unsafe_path(path) == ""

    @pytest.mark.parametrize(
        ("paths", "why"),
        [
            (["a", "A"], "one name"),
            (["model/a", "Model/b"], "one name"),
            (["straße", "STRASSE"], "one name"),
            (["ﬁle", "file"], "one name"),
            (["K", "k"], "one name"),
            (["a", "a"], "twice"),
            (["a", "a/b"], "file, and the folder"),
            (["a/b", "a"], "file, and the folder"),
        ],
    )
    def test_two_that_are_one(self, paths: list[str], why: str) -> None:
        assert why in collision(paths)

    def test_those_of_a_bundle_stand_together(self, made: Path) -> None:
        assert collision(p.relative_to(made).as_posix() for p in files_under(made)) == ""


class TestSums:
    GOOD = f"{'0' * 64}  a\n{'1' * 64}  b/c\n"

    def test_round_trip(self) -> None:
        assert sums_text(parse_sums(self.GOOD.encode())) == self.GOOD

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("", "line feed"),
            (GOOD.rstrip("\n"), "line feed"),
            (GOOD + "\n", "line 3"),
            (GOOD.replace("\n", "\r\n"), "line 1 is not canonical: it ends with CR LF"),
            (f"{'A' * 64}  a\n", "capital"),
            (f"{'0' * 64} a\n", "line 1"),
            (f"{'0' * 64} *a\n", "line 1"),
            (f"{'0' * 63}  a\n", "line 1"),
            (f" {'0' * 64}  a\n", "line 1"),
            (f"\\{'0' * 64}  a\\nb\n", "line 1"),
            (f"{'0' * 64}  b\n{'1' * 64}  a\n", "line 2 is not canonical: the paths are not sorted"),
            (f"{'0' * 64}  a\n{'0' * 64}  a\n", "line 2 is not canonical: the path is there twice"),
            (f"{'0' * 64}  ../x\n", "'..'"),
            (f"{'0' * 64}  a/../x\n", "'..'"),
            (f"{'0' * 64}  ./x\n", "'.'"),
            (f"{'0' * 64}  a//x\n", "empty"),
            (f"{'0' * 64}  /etc/passwd\n", "absolute"),
            (f"{'0' * 64}  C:x\n", "absolute"),
            (f"{'0' * 64}  a\\b\n", "backslash"),
            (f"{'0' * 64}  a\tb\n", "control"),
            (f"{'0' * 64}  SHA256SUMS\n", "cannot be listed"),
            (f"{'0' * 64}  model.sig\n", "cannot be listed"),
            (f"{'0' * 64}  {'x' * 600}\n", "600 characters"),
        ],
    )
    def test_anything_else_is_refused_with_its_line(self, text: str, why: str) -> None:
        with pytest.raises(UserError) as caught:
            parse_sums(text.encode())
        assert why in caught.value.cause

    def test_bytes_that_are_no_text(self) -> None:
        with pytest.raises(UserError, match="line 1 is not UTF-8"):
            parse_sums(b"\xff\xfe\n")

    @given(st.binary(max_size=200))
    def test_any_bytes_are_canonical_or_refused(self, data: bytes) -> None:
        try:
            assert sums_text(parse_sums(data)).encode() == data
        except UserError:
            pass

    @given(
        st.dictionaries(
            st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
                lambda p: not unsafe_path(p) and p not in ("SHA256SUMS", "model.sig")
            ),
            st.just("ab" * 32),
            min_size=1,
        )
    )
    def test_every_safe_path_can_be_listed(self, hashes: dict[str, str]) -> None:
        assert parse_sums(sums_text(hashes).encode()) == hashes


class TestManifest:
    def test_its_own_hash(self, made: Path) -> None:
        data = (made / "manifest.json").read_bytes()
        assert self_hash_holds(data)
        assert not self_hash_holds(data.replace(b'"seed": 0', b'"seed": 1'))
        assert not self_hash_holds(b"{}")
        assert manifest_bytes(parse_manifest(data)) == data

    def test_unknown_key(self, made: Path) -> None:
        data = json.loads((made / "manifest.json").read_bytes())
        data["surprise"] = 1
        with pytest.raises(UserError, match="surprise"):
            parse_manifest(json.dumps(data).encode())


class TestBuild:
    def test_replaces_a_bundle_and_nothing_else(self, copy: Path, ingredients: Ingredients, tmp_path: Path) -> None:
        stale = copy / "stale.txt"
        stale.write_text("old", encoding="utf-8")
        ingredients.make(copy)
        assert not stale.exists()
        verify_bundle(copy, replay=False)
        other = tmp_path / "holiday-photos"
        other.mkdir()
        (other / "one.jpg").write_bytes(b"x")
        with pytest.raises(UserError, match="not a bundle"):
            ingredients.make(other)
        assert (other / "one.jpg").read_bytes() == b"x"

    def test_leftovers_of_killed_runs(self, copy: Path, ingredients: Ingredients) -> None:
        (copy.parent / f".{copy.name}.tmp-1").mkdir()
        (copy.parent / f".{copy.name}.tmp-1" / "half").write_bytes(b"x")
        old = copy.parent / f".{copy.name}.old-1"
        copy.rename(old)  # as if killed between the two renames
        with pytest.raises(UserError):
            ingredients.make(copy, artifacts=[])
        with pytest.raises(UserError, match="tokenizer"):
            ingredients.make(copy, student_dir=copy.parent)
        verify_bundle(copy, replay=False)
        assert sorted(p.name for p in copy.parent.iterdir()) == [copy.name]

    @pytest.mark.skipif(platform.system() != "Linux", reason="renameat2 is Linux's")
    def test_exchange_is_one_step(self, tmp_path: Path) -> None:
        for name in "ab":
            (tmp_path / name).mkdir()
            (tmp_path / name / name).touch()
        if _exchange(tmp_path / "a", tmp_path / "b"):
            assert (tmp_path / "a/b").exists()
            assert (tmp_path / "b/a").exists()
        assert not _exchange(tmp_path / "a", tmp_path / "absent")

    def test_full_disk_leaves_the_old_bundle(self, copy: Path, ingredients: Ingredients) -> None:
        # A limit on the size of a file is a real error of the system, without a disk to fill.
        code = (
            "import resource, sys\n"
            "sys.path.insert(0, sys.argv[1])\n"
            "from pathlib import Path\n"
            "import bundle_fixtures as f\n"
            "from edgedistill.errors import UserError\n"
            "from edgedistill.records.artifact import Artifact\n"
            "i = object.__new__(f.Ingredients)\n"
            "i.folder = Path(sys.argv[2])\n"
            "i.store, i.checkpoint = f.Store(i.folder / 'store'), i.folder / 'student'\n"
            "i.teacher_dir, i.artifact_dir = i.folder / 'teacher', i.folder / 'artifact'\n"
            "i.artifact = Artifact.model_validate_json(sys.argv[4])\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
            "try:\n"
            "    i.make(Path(sys.argv[3]))\n"
            "except UserError as error:\n"
            "    print(error)\n"
        )
        arguments = [
            str(Path(__file__).resolve().parents[1] / "helpers"),
            str(ingredients.folder),
            str(copy),
            ingredients.artifact.model_dump_json(),
        ]
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=REPO, capture_output=True, text=True)
        assert "cannot be written" in done.stdout, done.stderr
        verify_bundle(copy, replay=False)
        assert sorted(p.name for p in copy.parent.iterdir()) == [copy.name]

    def test_records_of_other_bytes(self, ingredients: Ingredients, tmp_path: Path) -> None:
        other = ingredients.artifact.model_copy(update={"sha256": "9" * 64})
        for changes in ({"retention": retention(other)}, {"latency": latency(other)}):
            with pytest.raises(UserError, match="is of other bytes"):
                ingredients.make(tmp_path / "b", artifacts=[ingredients.bundled(**changes)])
        assert list(tmp_path.iterdir()) == []

    def test_artifact_changed_since_it_was_exported(self, ingredients: Ingredients, tmp_path: Path) -> None:
        elsewhere = shutil.copytree(ingredients.artifact_dir, tmp_path / "artifact")
        with (elsewhere / "model.gguf").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x7f")
        with pytest.raises(UserError, match="not what its record says"):
            ingredients.make(tmp_path / "out" / "b", artifacts=[ingredients.bundled(folder=elsewhere)])
        assert list((tmp_path / "out").iterdir()) == []

    def test_figures_that_are_no_numbers(self, ingredients: Ingredients, tmp_path: Path) -> None:
        broken = retention(ingredients.artifact, retention=Scored(value=float("nan"), ci95=(0.0, 1.0)))
        with pytest.raises(UserError, match=r"reports/retention\.json"):
            ingredients.make(tmp_path / "b", artifacts=[ingredients.bundled(retention=broken)])

    def test_a_runtime_that_disagrees_with_itself(
        self, ingredients: Ingredients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(golden_rules, "MAX_SEEN", 1e-6)
        with pytest.raises(RuntimeCrashed, match="disagrees with itself"):
            ingredients.make(tmp_path / "b")
        assert list(tmp_path.iterdir()) == []

    def test_licence_and_card(self, ingredients: Ingredients, made: Path, tmp_path: Path) -> None:
        assert "not known" in (made / "LICENSE").read_text(encoding="utf-8")
        card = (made / "MODEL_CARD.md").read_text(encoding="utf-8")
        assert "license: unknown" in card
        assert "basis: measured" in card
        assert "basis **proxy**" in card
        assert "To be filled in" in card
        teacher = tmp_path / "teacher"
        teacher.mkdir()
        (teacher / "LICENSE").write_text("The Teacher Licence\n", encoding="utf-8")
        hostile = teacher_result(teacher, name="x | y\n# <script>alert(1)</script> [a](b)")
        second = ingredients.make(
            tmp_path / "b", teacher=hostile, data=None, held_out_texts=[], artifacts=[ingredients.bundled(latency=None)]
        )
        assert (second / "LICENSE").read_text(encoding="utf-8") == "The Teacher Licence\n"
        card = (second / "MODEL_CARD.md").read_text(encoding="utf-8")
        assert "<script>" not in card
        assert "\n# <" not in card
        assert "not measured" in card
        assert not (second / "reports/latency.json").exists()
        check = verify_bundle(second, store=ingredients.store)
        assert check.golden_replayed >= 3  # fixed prompts alone

    def test_the_students_own_licence_and_every_teachers(self, ingredients: Ingredients, tmp_path: Path) -> None:
        folders = {name: tmp_path / name for name in ("student", "teacher", "silent", "second")}
        for folder in folders.values():
            folder.mkdir()
        (folders["student"] / "LICENSE").write_text("The Student Licence\n", encoding="utf-8")
        (folders["teacher"] / "LICENSE.txt").write_text("The Teacher Licence\n", encoding="utf-8")
        (folders["second"] / "COPYING").write_text("The Second Licence\n", encoding="utf-8")
        (folders["second"] / "NOTICE").write_text("Made by the second\n", encoding="utf-8")
        also = [
            FurtherTeacher(
                **teacher_result(folders[name], name=name).model_dump(
                    include={"name", "origin", "path", "shape", "parameters", "weights_sha256", "tokenizer_sha256"}
                ),
                weight=0.5,
            )
            for name in ("silent", "second")
        ]
        recipe = Recipe.model_validate({"student": {"start": "pretrained", "model": str(folders["student"])}})
        made = ingredients.make(
            tmp_path / "b",
            recipe=recipe,
            student=student_result(tokenizer_sha256(ingredients.checkpoint)).model_copy(update={"start": "pretrained"}),
            teacher=teacher_result(folders["teacher"]).model_copy(update={"also": also}),
        )
        text = (made / "LICENSE").read_text(encoding="utf-8")
        places = [text.index(f"The {name} Licence\n") for name in ("Student", "Teacher", "Second")]
        assert places == sorted(places)
        assert "Licence of the student (student)" in text and "Licence of the teacher (big-llama)" in text
        assert "Not known: the licence of the teacher (silent)" in text
        assert "Made by the second" in (made / "NOTICE").read_text(encoding="utf-8")
        card = (made / "MODEL_CARD.md").read_text(encoding="utf-8")
        assert "license: unknown" in card  # one of them is
        assert "no licence was found beside the weights of the teacher (silent)" in card

    def test_two_artifacts(self, ingredients: Ingredients, tmp_path: Path) -> None:
        other = ingredients.exported("Q8_0")
        both = ingredients.make(tmp_path / "b", artifacts=[ingredients.bundled(), other])
        assert (both / "model/gguf-q8_0/model.gguf").is_file()
        assert (both / "reports/gguf-Q8_0/retention.json").is_file()
        assert [a.name for a in read_manifest(both).artifacts] == ["gguf:Q4_0", "gguf:Q8_0"]
        check = verify_bundle(both, store=ingredients.store)
        assert [r.artifact for r in check.replays] == ["gguf:Q4_0", "gguf:Q8_0"]
        with pytest.raises(UserError, match="same artifact twice"):
            ingredients.make(tmp_path / "c", artifacts=[ingredients.bundled(), ingredients.bundled()])


@pytest.fixture(scope="module")
def second(ingredients: Ingredients, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF, and an ONNX model beside it."""
    both = [ingredients.bundled(), ingredients.exported("INT4", onnx=True)]
    return ingredients.make(tmp_path_factory.mktemp("onnx") / "b", artifacts=both)


class TestOnnx:
    def test_beside_the_gguf(self, second: Path, ingredients: Ingredients) -> None:
        check = verify_bundle(second, store=ingredients.store)
        assert [r.artifact for r in check.replays] == ["gguf:Q4_0", "onnx:INT4"]
        artifact = read_manifest(second).artifacts[1]
        assert artifact.folder == "model/onnx"
        assert artifact.inputs[0].name == "input_ids"
        assert artifact.inputs[0].dtype == "int64"
        assert any(tensor.name == "logits" for tensor in artifact.outputs)

    @pytest.mark.parametrize(
        "name", ["pytorch_model.bin", "libcustom.so", "sitecustomize.py", "adapter.safetensors", "templates/x.jinja"]
    )
    def test_what_the_runtime_does_not_open_is_no_part_of_an_artifact(
        self, second: Path, tmp_path: Path, name: str
    ) -> None:
        copy = Path(shutil.copytree(second, tmp_path / second.name))
        artifact = read_manifest(copy).artifacts[1]
        path = copy / artifact.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\x80\x04cos\nsystem\n")

        def with_it(manifest: Manifest) -> Manifest:
            entry = FileEntry(path=name, bytes=path.stat().st_size, sha256=sha256_of(path))
            one = manifest.artifacts[1]
            files = sorted([*one.files, entry], key=lambda each: each.path)
            changed = one.model_copy(
                update={"files": files, "bytes": one.bytes + entry.bytes, "sha256": combined_sha256(files)}
            )
            for report in (one.retention, one.latency):
                text = (copy / report).read_text().replace(one.sha256, changed.sha256) if report else ""
                if report:
                    (copy / report).write_text(text, newline="\n")
            listed = [*manifest.files, entry.model_copy(update={"path": f"{one.folder}/{name}"})]
            return manifest.model_copy(
                update={
                    "artifacts": [manifest.artifacts[0], changed],
                    "files": sorted(listed, key=lambda each: each.path),
                }
            )

        reseal(copy, with_it)
        refused(copy, f"onnx:INT4 holds '{name}', which onnxruntime-genai does not open")

    def test_sample(self, second: Path) -> None:
        done = subprocess.run(
            [sys.executable, str(second / "samples/python/run_onnx.py"), "Once upon", "--tokens", "8"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) > len("Once upon\n")

    @pytest.mark.parametrize(
        ("change", "needle"),
        [
            ({"tensor_types": {"INT2": 1_000_000}}, "tensor_types of onnx:INT4"),
            ({"bits_per_weight": 0.01}, "bits_per_weight of onnx:INT4"),
            ({"inputs": []}, "inputs of onnx:INT4"),
            ({"outputs": []}, "outputs of onnx:INT4"),
            ({"fallbacks": [Fallback(tensor="x", wanted="INT4", got="FP32", why="x")]}, "fallbacks of onnx:INT4"),
            ({"overrides": {"y": "INT1"}}, "overrides of onnx:INT4"),
            ({"runtime": "onnxruntime"}, "runs no onnx"),
            ({"context_tokens": 500}, "a context of 500"),
        ],
    )
    def test_claims_that_lie(self, second: Path, tmp_path: Path, change: dict[str, object], needle: str) -> None:
        copy = Path(shutil.copytree(second, tmp_path / second.name))
        reseal(
            copy,
            lambda m: m.model_copy(update={"artifacts": [m.artifacts[0], m.artifacts[1].model_copy(update=change)]}),
        )
        refused(copy, needle)

    @pytest.mark.parametrize(
        ("quantization", "needle"),
        [("INT8", "have [4] bits"), ("FP32", "its matrices are"), ("INT8-DYNAMIC", "which no")],
    )
    def test_another_quantization(self, second: Path, quantization: str, needle: str) -> None:
        """What the gate does not ask first: whether the graph is what the label says."""
        artifact = read_manifest(second).artifacts[1].model_copy(update={"quantization": quantization})
        with pytest.raises(UserError) as caught:
            check_onnx_facts(second, artifact, lambda path: read_or_key_error(second / path))
        assert needle in caught.value.cause

    @pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "tokenizer_config.json"])
    def test_a_tokenizer_that_is_another(self, second: Path, tmp_path: Path, name: str) -> None:
        """Without the GGUF beside it, whose own tokenizer would tell too."""
        copy = Path(shutil.copytree(second, tmp_path / second.name))
        path = copy / "preprocess" / name
        if name == "tokenizer.json":
            swap_two_words(path)
        elif name == "chat_template.jinja":
            path.write_text("{{ messages }}", encoding="utf-8")
        else:
            tree = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps({**tree, "eos_token": "<|bos|>"}), encoding="utf-8")
        artifact = read_manifest(copy).artifacts[1]
        with pytest.raises(UserError, match="is not the tokenizer of onnx:INT4"):
            check_onnx_facts(copy, artifact, lambda path: read_or_key_error(copy / path))

    @pytest.mark.parametrize("quantization", ["INT8", "FP32"])
    def test_counted_as_the_exporter_counts(self, ingredients: Ingredients, quantization: str) -> None:
        one = ingredients.exported(quantization, onnx=True)
        weights = _stored(check_onnx(one.folder / "model.onnx"))
        assert [tuple(w) for w in weights] == [(w.name, w.type, w.rank, w.bytes) for w in stored_weights(one.folder)]
        _check_quantization(f"onnx:{quantization}", quantization, check_onnx(one.folder / "model.onnx"), weights)
