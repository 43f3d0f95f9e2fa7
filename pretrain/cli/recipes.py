"""`pretrain recipes`: which there are and what each is meant for; one of them with its comments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from pretrain.cli.filled import Filled
from pretrain.screen import say

__all__ = ["recipes"]

_COLUMNS = ("recipe", "model", "data", "hardware", "time")


@click.command(cls=Filled)
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the recipes with what each is meant for, or print one."""
    from pretrain.config.load import recipe_content, recipe_names, recipe_path

    if name is not None:
        for line in recipe_path(name).read_text(encoding="utf-8").splitlines():
            say(line)
        return
    rows = [_COLUMNS, *(_row(known, recipe_content(known)) for known in recipe_names())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for row in rows:
        say("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _row(name: str, content: Mapping[str, Any]) -> tuple[str, ...]:
    suits = content["suits"]
    return name, _model(content["backbone"]), suits["data"], suits["hardware"], suits["time"]


def _model(backbone: Mapping[str, Any]) -> str:
    """`ViT-Tiny/4, 32 px` of `vit_tiny_patch16_224` with another patch and image size; other names as they are.

    One with another width or depth is not of that family any more: `ViT 128 x 4/8, 32 px` has width 128 and 4 blocks.
    """
    family, _, rest = str(backbone["name"]).partition("_patch")
    patch, _, side = rest.partition("_")
    sizes = f"/{backbone.get('patch_size', patch)}, {backbone.get('image_size', side)} px"
    if not rest:
        return str(backbone["name"])
    options = backbone.get("options") or {}
    if {"embed_dim", "depth"} <= options.keys():
        return f"ViT {options['embed_dim']} x {options['depth']}{sizes}"
    return f"ViT-{family.removeprefix('vit_').title()}{sizes}"
