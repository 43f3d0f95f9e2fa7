"""The repeated blocks of a network: the parts, alike and one after the other, that most of it consists of."""

from __future__ import annotations

from torch import nn

__all__ = ["outer_blocks"]


def outer_blocks(module: nn.Module) -> list[nn.Module]:
    """What is in the lists that are called "blocks", as timm calls them; a block within a block is part of that."""
    lists = {name: child for name, child in module.named_modules() if name.rpartition(".")[2] == "blocks"}
    outer = [child for name, child in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return [block for child in outer for block in child.children()]
