"""sbom.cdx.json: the model, what made it and what runs it, as CycloneDX 1.6. The same bundle, the same bytes.

Written out rather than by a library: `bundle verify` makes it again, with nothing but edgedistill installed.
tests/bundle/test_bundle.py holds it to the format's own schema.
"""

from __future__ import annotations

import json
import uuid
from typing import Any
from urllib.parse import quote

from edgedistill.records.manifest import BundleArtifact, Manifest

RUNTIME_PACKAGES = {
    "llama.cpp": ("llama-cpp-python",),
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-genai": ("onnxruntime-genai", "onnxruntime"),
    "transformers": ("torch", "transformers", "accelerate", "bitsandbytes"),
    "executorch": ("executorch",),
}


def sbom_text(manifest: Manifest) -> str:
    """The SBOM. Its serial number follows from the artifacts' hashes; it carries no time of day."""
    runtimes = {name for artifact in manifest.artifacts for name in RUNTIME_PACKAGES[artifact.runtime]}
    tools = [
        {
            "bom-ref": f"pkg/{name}",
            "name": name,
            "purl": f"pkg:pypi/{quote(name, safe='-._~')}@{quote(version, safe='-._~')}",
            "scope": "required" if name in runtimes else "excluded",
            "type": "library",
            "version": version,
        }
        for name, version in sorted(manifest.tool_versions.items())
        if version != "absent" and name != "python"
    ]
    models = sorted(map(_model, manifest.artifacts), key=lambda one: str(one["bom-ref"]))
    refs = sorted(str(one["bom-ref"]) for one in [*models, *tools])
    depends = [{"ref": ref} for ref in refs] + [{"ref": "bundle", "dependsOn": refs}]
    identity = ":".join(["edgedistill", manifest.name, *(artifact.sha256 for artifact in manifest.artifacts)])
    bom = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, identity)}",
        "metadata": {
            "component": {
                "bom-ref": "bundle",
                "name": manifest.name,
                "type": "application",
                "version": manifest.artifacts[0].sha256[:16],
            }
        },
        "components": [*tools, *models],
        "dependencies": sorted(depends, key=lambda one: str(one["ref"])),
    }
    return json.dumps(bom, indent=1, sort_keys=True) + "\n"


def _model(artifact: BundleArtifact) -> dict[str, Any]:
    return {
        "bom-ref": f"artifact/{artifact.name}",
        "name": artifact.name,
        "type": "machine-learning-model",
        "version": artifact.sha256[:16],
        "components": [
            {
                "bom-ref": f"file/{artifact.folder}/{entry.path}",
                "name": f"{artifact.folder}/{entry.path}",
                "type": "file",
                "hashes": [{"alg": "SHA-256", "content": entry.sha256}],
            }
            for entry in artifact.files
        ],
        "properties": [
            {"name": "edgedistill:quantization", "value": artifact.quantization},
            {"name": "edgedistill:runtime", "value": artifact.runtime},
        ],
    }
