"""JSON Schemas of the files that others read: `python docs/write_schemas.py` writes them."""

from __future__ import annotations

import json
from pathlib import Path

from edgedistill.records.base import Record
from edgedistill.records.latency import Latency
from edgedistill.records.manifest import Manifest
from edgedistill.records.retention import Retention

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCHEMAS: dict[str, type[Record]] = {
    "edgedistill.bundle-1.json": Manifest,
    "edgedistill.latency-1.json": Latency,
    "edgedistill.retention-1.json": Retention,
}


def schema_text(record: type[Record]) -> str:
    """The JSON Schema of what a record writes: every field is there, none else."""
    schema = record.model_json_schema(by_alias=True, mode="serialization")
    for part in (schema, *schema.get("$defs", {}).values()):
        # A default spares the writer a word; in the file the field is there, unless it says otherwise.
        if "properties" in part:
            part["required"] = [name for name, each in part["properties"].items() if "leftOutWhereEmpty" not in each]
    return json.dumps({"$schema": DIALECT, **schema}, indent=1, sort_keys=True) + "\n"


def write_schemas(folder: Path) -> list[Path]:
    """Write every schema; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, record in SCHEMAS.items():
        path = folder / name
        path.write_text(schema_text(record), encoding="utf-8", newline="\n")
        paths.append(path)
    return paths


if __name__ == "__main__":
    for written in write_schemas(Path(__file__).parent / "schemas"):
        print(written)
