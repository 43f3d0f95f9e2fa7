"""Folders that timm loads by itself: `config.json` and `model.safetensors`; with a model card, a hub repository.

timm's own writer describes what timm's weights of that name were (their license, their classes); this one says what the
backbone is. Everything is tried before it is kept: timm builds the model from the folder, and it must compute the same.

Not here: graphs (`graphs`), what becomes of the folder (`export`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from backbones.images.base import ImageEncoder
from backbones.images.timm_internals import model_arguments
from pretrain.errors import RequestError, RunFailed

if TYPE_CHECKING:
    from pretrain.exports.export import Source

__all__ = ["write_hf", "write_timm"]

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
SMALL_IMAGE = 64  # pixels; evaluation shows smaller images whole, larger ones without a border


def write_timm(source: Source, folder: Path) -> None:
    """Make a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Its `forward_features` is the backbone's. Its `forward` gives one vector per image as timm pools: of a
    plain ViT the class token, or the mean of its patches where it has none.

    Raises:
        RequestError: timm does not have this model.
        RunFailed: timm does not build the same model from it.
    """
    backbone = source.backbone
    if not isinstance(backbone, ImageEncoder) or backbone.spec["library"] != "timm":
        kind = backbone.spec.get("kind", "image")
        raise RequestError(
            f"backbone {backbone.spec['name']!r} of kind {kind!r} is not one of timm's, so timm cannot load it; use "
            "--format safetensors"
        )
    folder.mkdir()
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in backbone.weights().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(folder.stat().st_mode & 0o666)  # safetensors writes files that only their owner can read
    problem = ""
    for arguments in _arguments(backbone):
        config = _config(backbone, arguments)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        problem = _problem(backbone, folder)
        if not problem:
            return
    raise RunFailed(f"timm does not rebuild backbone {backbone.spec['name']!r}: {problem}; use --format safetensors")


def write_hf(source: Source, folder: Path) -> None:
    """`write_timm`, with a model card: what the Hugging Face hub shows, and `timm` and `transformers` load."""
    write_timm(source, folder)
    (folder / CARD).write_text(_card(source), encoding="utf-8")


def _arguments(backbone: ImageEncoder) -> Iterator[dict[str, Any]]:
    """Arguments for timm's factory, the ones with a useful `forward` first."""
    # The number of classes, none, is said elsewhere in the file: `transformers` gives it to the factory by itself.
    said = ("global_pool", "num_classes")
    given = {name: value for name, value in model_arguments(backbone.network).items() if name not in said}
    if backbone.has_plain_blocks:
        # The norm stays where it was trained, behind the last block and before the pooling.
        yield given | ({"global_pool": "token"} if backbone.has_cls else {"global_pool": "avg", "fc_norm": False})
        yield given | {"global_pool": "avg", "use_fc_norm": False}  # as timm's class of rotary ViTs calls it
    yield given
    yield given | {"global_pool": ""}


def _config(backbone: ImageEncoder, arguments: Mapping[str, Any]) -> dict[str, Any]:
    size, own = backbone.image_size, getattr(backbone.network, "pretrained_cfg", None) or {}
    takes_other_sizes = bool(arguments.get("dynamic_img_size")) or "img_size" not in arguments
    pretrained = {
        "input_size": [backbone.in_chans, size, size],
        "fixed_input_size": not takes_other_sizes,
        "interpolation": "bicubic",
        "crop_pct": 1.0 if size < SMALL_IMAGE else 224 / 256,
        "crop_mode": "center",
        "mean": backbone.spec["pixel_mean"],
        "std": backbone.spec["pixel_std"],
        "num_classes": 0,
        # Names of modules, by which timm fits weights to other channels and leaves out a new classifier.
        **{key: own[key] for key in ("first_conv", "classifier") if own.get(key)},
    }
    pool = arguments.get("global_pool")
    return {
        "architecture": backbone.spec["name"].partition(".")[0],
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        **({"global_pool": pool} if pool else {}),
        "model_args": dict(arguments),
        "pretrained_cfg": pretrained,
    }


def _problem(backbone: ImageEncoder, folder: Path) -> str:
    """What is different in the model that timm makes of a folder; empty if nothing is."""
    import timm

    try:
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # of any type: models check their arguments in ways of their own
        return next(iter(str(error).splitlines()), "") or type(error).__name__
    ours, theirs = backbone.network.state_dict(), model.state_dict()
    if ours.keys() != theirs.keys():
        return f"its weights have other names, such as {min(ours.keys() ^ theirs.keys())}"
    if wrong := [name for name in ours if not torch.equal(ours[name].cpu(), theirs[name])]:
        return f"{len(wrong)} weights differ, such as {wrong[0]}"
    images = torch.rand(2, backbone.in_chans, backbone.image_size, backbone.image_size, generator=torch.Generator())
    with torch.inference_mode():
        expected, found = backbone.forward_features(images), model.forward_features(images)  # type: ignore[operator]
        pooled = model(images)
    pairs = zip(*(out if isinstance(out, list | tuple) else [out] for out in (expected, found)), strict=True)
    if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max())) for a, b in pairs):
        return "its forward_features differ"
    return "" if isinstance(pooled, torch.Tensor) else "its forward gives no tensor"


def _card(source: Source) -> str:
    backbone, manifest = source.backbone, source.manifest
    assert isinstance(backbone, ImageEncoder)  # or `write_timm` had refused it
    spec = backbone.spec
    grid = f"{backbone.grid[0]} x {backbone.grid[1]}"
    run, step, seen = (_plain(manifest.get(key, "?")) for key in ("run_id", "step", "samples_seen"))
    mean, std = (", ".join(f"{value:g}" for value in spec[key]) for key in ("pixel_mean", "pixel_std"))
    vector = "the class token" if backbone.has_cls else "the mean of the patch tokens, or what timm pools"
    lines = [
        "---",
        "library_name: timm",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        "- timm",
        "- transformers",
        "- image-feature-extraction",
        "- self-supervised",
        "---",
        f"# {_plain(spec['name'])}, pretrained without labels",
        "",
        f"Backbone of step {step} of the run `{run}`, which had seen {seen} samples. It has no classifier.",
        "",
        "| what | value |",
        "|---|---|",
        f"| input | {backbone.in_chans} x {backbone.image_size} x {backbone.image_size}, (pixel - mean) / std |",
        f"| mean, std | {mean}; {std}, for pixels in [0, 1] |",
        f"| tokens | {grid} patches of width {backbone.embed_dim} |",
        f"| one vector per image | {vector} |",
        "",
        "```python",
        "import timm",
        "",
        'model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True).eval()  # or "local-dir:FOLDER"',
        "config = timm.data.resolve_model_data_config(model)",
        "transform = timm.data.create_transform(**config, is_training=False)",
        "vector = model(transform(image).unsqueeze(0))  # image: an RGB PIL image",
        "tokens = model.forward_features(transform(image).unsqueeze(0))",
        "```",
        "",
    ]
    if spec.get("position_resampling", "timm") != "timm":
        note = "Images of another size: positions were resampled as DINO does in training, and are as timm does here."
        lines += [note, ""]
    return "\n".join(lines)


def _plain(value: object) -> str:
    """Text of others without what ends a line or a span of code in a model card."""
    return "".join(letter for letter in str(value) if letter.isprintable() and letter not in "`|<>")
