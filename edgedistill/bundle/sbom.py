"""sbom.cdx.json: the model, what made it and what runs it, as CycloneDX 1.6. The same bundle, the same bytes."""

from __future__ import annotations

import json
import uuid
from typing import Any

from edgedistill.bundle.manifest import BundleArtifact, Manifest

RUNTIME_PACKAGES = {
    "llama.cpp": ("llama-cpp-python",),
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-genai": ("onnxruntime-genai", "onnxruntime"),
    "transformers": ("torch", "transformers", "accelerate", "bitsandbytes"),
}


def sbom_text(manifest: Manifest) -> str:
    """The SBOM. Its serial number follows from the artifacts' hashes; it carries no time of day."""
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentScope, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    def model(artifact: BundleArtifact) -> Component:
        return Component(
            name=artifact.name,
            type=ComponentType.MACHINE_LEARNING_MODEL,
            bom_ref=f"artifact/{artifact.name}",
            version=artifact.sha256[:16],
            components=[
                Component(
                    name=f"{artifact.folder}/{entry.path}",
                    type=ComponentType.FILE,
                    bom_ref=f"file/{artifact.folder}/{entry.path}",
                    hashes=[HashType(alg=HashAlgorithm.SHA_256, content=entry.sha256)],
                )
                for entry in artifact.files
            ],
            properties=[
                Property(name="edgedistill:quantization", value=artifact.quantization),
                Property(name="edgedistill:runtime", value=artifact.runtime),
            ],
        )

    runtimes = {name for artifact in manifest.artifacts for name in RUNTIME_PACKAGES[artifact.runtime]}
    tools = [
        Component(
            name=name,
            version=version,
            type=ComponentType.LIBRARY,
            bom_ref=f"pkg/{name}",
            scope=ComponentScope.REQUIRED if name in runtimes else ComponentScope.EXCLUDED,
            purl=PackageURL("pypi", None, name, version),
        )
        for name, version in sorted(manifest.tool_versions.items())
        if version != "absent" and name != "python"
    ]
    identity = ":".join(["edgedistill", manifest.name, *(artifact.sha256 for artifact in manifest.artifacts)])
    serial = uuid.uuid5(uuid.NAMESPACE_URL, identity)
    bom = Bom(components=[*map(model, manifest.artifacts), *tools], serial_number=serial)
    bom.metadata.component = Component(
        name=manifest.name,
        type=ComponentType.APPLICATION,
        bom_ref="bundle",
        version=manifest.artifacts[0].sha256[:16],
    )
    bom.register_dependency(bom.metadata.component, bom.components)
    made: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    # Optional in the format, and the only thing in it that would differ between two equal builds.
    made["metadata"].pop("timestamp", None)
    return json.dumps(made, indent=1, sort_keys=True) + "\n"
