"""What identifies a run: the same identity gives the same bytes, and lets a run be resumed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from quantdit.compiling.plan import Plan
from quantdit.pipelines.sampling import conditions
from quantdit.pipelines.source import Source
from quantdit.system import files
from quantdit.system.version import VERSION


def identity_of(pipeline: object, source: Source, plan: Plan) -> dict:
    """Return the recipe, the provenance and a digest of the source's configs: what calibration_report.json begins with.

    Raises:
        ValueError: the pipeline cannot be sampled as planned.
    """
    provenance = {
        "quantdit": VERSION,
        "source": source.label,
        "source_sha256": _source_digest(source),
        "calibration": asdict(plan.sampling) | {"conditions": conditions(pipeline, plan.sampling)},
    }
    if source.random_weights:
        provenance["random_weights"] = True
    if plan.target is not None:
        provenance["target"] = asdict(plan.target)
    if plan.finetuning is not None:
        provenance["training"] = asdict(plan.finetuning)
    whole = {"recipe": plan.recipe.to_dict(), "provenance": provenance, "source_config_sha256": _config_digest(source)}
    return json.loads(json.dumps(whole))  # as the report that is read gives it: no tuples


def run_of(identity: dict) -> str:
    """Return the name of a run, which what it keeps in the work folder is sealed with."""
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _source_digest(source: Source) -> str:
    """Identify the source's transformers by the sha256 of their files' sha256s."""
    whole = hashlib.sha256()
    for name in source.components:
        for path in sorted(source.folder_of(name).glob("*.safetensors")):
            whole.update(files.sha256(path).encode())
    return whole.hexdigest()


def _config_digest(source: Source) -> str:
    """Identify what else decides on the calls: the configs of the transformers, of the scheduler and of all other parts."""
    found = (path.relative_to(source.folder) for pattern in ("*.json", "*/*.json") for path in source.folder.glob(pattern))
    shown = sorted(path for path in found if not any(part.startswith(".") for part in path.parts))
    return hashlib.sha256("\n".join(f"{path} {files.sha256(source.folder / path)}" for path in shown).encode()).hexdigest()
