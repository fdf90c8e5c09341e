"""docs/schemas/ is what the classes say, and what is really written keeps to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from bundle_fixtures import Ingredients
from write_schemas import SCHEMAS, schema_text, write_schemas

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "schemas"
WRITTEN = {
    "edgedistill.bundle-1.json": "manifest.json",
    "edgedistill.latency-1.json": "reports/latency.json",
    "edgedistill.retention-1.json": "reports/retention.json",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    return Ingredients(folder).make(folder / "out" / "quickstart-jetson-orin-nano")


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_files_are_the_classes(name: str) -> None:
    found = (FOLDER / name).read_text(encoding="utf-8") if (FOLDER / name).exists() else ""
    assert found == schema_text(SCHEMAS[name]), "run `python docs/write_schemas.py`"


def test_no_other_files() -> None:
    assert {p.name for p in FOLDER.glob("edgedistill.*-1.json")} == set(SCHEMAS) == set(WRITTEN)


def test_write(tmp_path: Path) -> None:
    assert {p.name for p in write_schemas(tmp_path / "deep")} == set(SCHEMAS)


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_what_is_written_keeps_to_it(name: str, made: Path) -> None:
    schema = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    written: dict[str, Any] = json.loads((made / WRITTEN[name]).read_text(encoding="utf-8"))
    assert list(validator.iter_errors(written)) == []
    assert list(validator.iter_errors({**written, "surprise": 1})) != []
    for key in written:
        without = {k: v for k, v in written.items() if k != key}
        assert list(validator.iter_errors(without)) != [], key
