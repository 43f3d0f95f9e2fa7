"""Any backbone as something that can be evaluated: checkpoints of ours, and weights of other tools.

    whatever `references.resolve` knows    a checkpoint of ours
    FILE.safetensors                       a backbone that we exported
    timm:NAME, timm:NAME@FILE              a timm model with its weights from the local cache, or from a file of
                                           safetensors or a state dict of torch: tensors are read, no code is run

Weights of other tools are written as a backbone of ours once, below `backbones/` of the storage, so that results,
features and comparisons know them by the digest of their tensors like any other.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

from backbones.errors import BackboneError
from data_pipelines.parsing import parse_json
from pretrain.checkpoints import references
from pretrain.checkpoints.initialization import TIMM, Weights, find_weights
from pretrain.errors import RequestError, listed
from pretrain.record.run_dir import BACKBONE, MANIFEST

__all__ = ["gradable", "is_foreign", "known_as"]

ORIGIN = "origin.json"  # beside weights of other tools: where they are from


def is_foreign(reference: str) -> bool:
    """Whether it names a file of weights, and no checkpoint of ours."""
    return reference.startswith(TIMM) or reference.endswith(".safetensors")


def gradable(reference: str, storage: Path) -> Path:
    """A directory or file that `backbones.io.load_backbone` takes.

    Args:
        reference: One of the forms at the top of this file.
        storage: Where runs live.

    Raises:
        RequestError: There is no such backbone here, or the file holds another model.
        CheckpointError: It is damaged.
    """
    if not is_foreign(reference):
        return references.resolve(reference, storage)
    weights = find_weights(reference, storage)
    if "name" not in weights.spec:
        raise RequestError(f"{reference}: nothing in the file says which model it is; a timm model is {TIMM}NAME@FILE")
    if not reference.startswith(TIMM):
        return weights.file
    made = storage / "backbones" / f"{weights.spec['name']}-{weights.sha256[:16]}"
    if not (made / BACKBONE).is_file():
        try:
            _write(weights, made)
        except BackboneError as error:
            raise RequestError(f"{reference}: {error}") from error
    return made


def known_as(path: Path) -> dict[str, str | int]:
    """Whose weights something gradable holds, as far as the directory says: `run_id` and `step`, or a `reference`."""
    for name, keys in ((MANIFEST, ("run_id", "step")), (ORIGIN, ("reference",))):
        try:
            record = parse_json((path / name).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and all(isinstance(record.get(key), str | int) for key in keys):
            return {key: record[key] for key in keys}
    return {}


def _write(weights: Weights, made: Path) -> None:
    """The tensors of a timm model under our own description of it; all of them have to be in the file.

    Raises:
        RequestError: Some are missing, or there are others than those of a classifier.
        BackboneError: They do not fit, or timm has no such model.
    """
    from backbones.io import initialize_from, open_weights, save_backbone
    from backbones.registry import from_spec

    encoder = from_spec(weights.spec)
    found = initialize_from(encoder, open_weights(weights.file))
    classifier = getattr(encoder.network, "pretrained_cfg", {}).get("classifier") or "head"
    heads = [classifier] if isinstance(classifier, str) else classifier
    left_out = {f"{name}.{part}" for name in heads for part in ("weight", "bias")}
    others = [name for name in found.unexpected if name not in left_out]
    for names, what in ((found.missing, "are missing in"), (others, "are not of this model, and are in")):
        if names:
            remedy = "name the model that they are of"
            raise RequestError(
                f"{weights.reference}: {len(names)} tensors {what} the file: {listed(names, 3)}; {remedy}"
            )
    aside = made.with_name(f"{made.name}.tmp-{uuid.uuid4().hex}")
    aside.mkdir(parents=True)
    try:
        save_backbone(aside / BACKBONE, encoder.weights(), encoder.spec)
        (aside / ORIGIN).write_text(json.dumps({"reference": weights.reference, "sha256": weights.sha256}))
        os.rename(aside, made)
    except OSError:
        if not (made / BACKBONE).is_file():  # another process was first
            raise
