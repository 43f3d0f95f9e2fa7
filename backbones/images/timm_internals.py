"""Everything of timm that is not its public interface, in one file, so that an upgrade of timm fails in one place.

timm's two classes of plain ViTs share attributes but no base class and no documented way to run some patches only or to
look between the blocks; what their `_pos_embed` and `forward_features` do is done here from their parts. A test touches
every name. Importing this imports neither torch nor timm, because the names of models are read without them.

Legend: B batch, C channels, N patch tokens, K kept patch tokens, P prefix tokens (class token, registers), D width,
H attention heads, d width of a head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from backbones.errors import BackboneError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = [
    "VIT_ATTRIBUTES",
    "ViTSizes",
    "attention_branch",
    "block_outputs",
    "blocks",
    "class_attention",
    "class_attention_branch",
    "embedded_patches",
    "enter_blocks",
    "final_norm",
    "has_class_token",
    "has_known_branches",
    "has_movable_positions",
    "is_plain_vit",
    "last_keys",
    "let_key_biases_follow",
    "mlp_branch",
    "model_arguments",
    "moved_rotation",
    "patch_projection",
    "prefix",
    "registered_names",
    "require_packable",
    "rotary_at",
    "rotations",
    "vit_sizes",
]

# What is read of a plain ViT, here and nowhere else.
VIT_ATTRIBUTES = (
    "blocks", "cls_token", "embed_dim", "grad_checkpointing", "no_embed_class", "norm", "norm_pre", "num_prefix_tokens",
    "patch_embed", "pos_drop", "pos_embed", "reg_token",
)  # fmt: skip

# The decorator, any further decorators, then the function whose name is the model's.
_REGISTERED = re.compile(r"^@register_model\b[^\n]*\n(?:@[^\n]*\n)*def (\w+)\(", re.MULTILINE)


def registered_names(models: Path) -> frozenset[str]:
    """Names of all models whose source files lie in the folder `models` of timm, read as text.

    timm registers a model by decorating a module-level function with `@register_model`; the function's name is the
    model's.
    """
    sources = sorted(models.glob("*.py"))
    return frozenset(name for source in sources for name in _REGISTERED.findall(source.read_text(encoding="utf-8")))


def is_plain_vit(model: nn.Module) -> bool:
    """Whether each patch is embedded alone and keeps its own token, in one of the two classes that are known here.

    Subclasses that embed or run tokens in their own way (distillation tokens, for example) are not.
    """
    from timm.layers import PatchEmbed
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer | Eva) or type(model.patch_embed) is not PatchEmbed:
        return False
    base = VisionTransformer if isinstance(model, VisionTransformer) else Eva
    return all(getattr(type(model), name) is getattr(base, name) for name in ("_pos_embed", "forward_features"))


def model_arguments(model: nn.Module) -> dict[str, Any]:
    """What `timm.create_model` was given beside the name, with which it builds the same architecture again."""
    return dict(model._model_args)  # type: ignore[arg-type]


class ViTSizes(NamedTuple):
    """What a plain ViT is built for."""

    image: tuple[int, int]  # height and width in pixels
    patch: tuple[int, int]  # height and width in pixels
    width: int  # D
    in_chans: int  # C
    num_prefix: int  # P
    num_blocks: int
    has_cls: bool
    positions_on_prefix: bool  # the position table has rows for prefix tokens


def vit_sizes(vit: Any) -> ViTSizes:
    """The sizes of a plain ViT."""
    embed = vit.patch_embed
    return ViTSizes(
        image=tuple(embed.img_size),
        patch=tuple(embed.patch_size),
        width=int(vit.embed_dim),
        in_chans=int(embed.proj.in_channels),
        num_prefix=int(vit.num_prefix_tokens),
        num_blocks=len(vit.blocks),
        has_cls=vit.cls_token is not None,
        positions_on_prefix=not vit.no_embed_class,
    )


def patch_projection(vit: Any) -> Tensor:
    """The weight that embeds patches, (D, C, p, p)."""
    weight: Tensor = vit.patch_embed.proj.weight
    return weight


def embedded_patches(vit: Any, x: Tensor, keep_idx: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
    """Patch tokens (B, N, D) of images (B, C, H, W) without positions, and their (rows, columns).

    Given `keep_idx` (B, K) only these patches are embedded, (B, K, D): the others would cost as much for nothing.
    """
    import torch
    from torch.nn import functional

    if keep_idx is None:
        patches = vit.patch_embed(x)  # (B, rows, columns, D)
        return patches.flatten(1, 2), (int(patches.shape[1]), int(patches.shape[2]))
    projection = vit.patch_embed.proj
    height, width = projection.kernel_size
    cells = x.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, ...)
    rows, columns = cells.shape[1:3]
    sample = torch.arange(len(x), device=x.device)[:, None]
    kept = cells[sample, keep_idx // columns, keep_idx % columns].flatten(2)  # (B, K, C p p)
    tokens = functional.linear(kept, projection.weight.flatten(1), projection.bias)
    return vit.patch_embed.norm(tokens), (rows, columns)


def prefix(vit: Any) -> Tensor | None:
    """Class token and registers without positions, (1, P, D); None where there are none."""
    import torch

    tokens = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
    return torch.cat(tokens, dim=1) if tokens else None


def enter_blocks(vit: Any, tokens: Tensor) -> Tensor:
    """What happens to tokens (B, P + K, D) with positions before the first block."""
    entered: Tensor = vit.norm_pre(vit.pos_drop(tokens))
    return entered


def rotations(vit: Any, tokens: Tensor, grid: tuple[int, int], keep_idx: Tensor | None) -> Tensor | None:
    """Rotary table for the patches that run, with a depth axis in front for models with one table per block."""
    from timm.layers import apply_keep_indices_nlc

    rope = getattr(vit, "rope", None)
    if rope is None:
        return None
    table: Tensor = rope.get_embed(shape=list(grid))  # (N, F), or (depth, heads, N, F)
    if keep_idx is None:
        return table
    kept = apply_keep_indices_nlc(tokens, table, keep_idx)  # batch axis in front
    return kept.transpose(0, 1) if vit.rope_mixed else kept.unsqueeze(1)


def rotary_at(vit: Any, rotary: Tensor | None, depth: int) -> Tensor | None:
    """The table of one block, of what `rotations` gave for all of them."""
    return rotary[depth] if rotary is not None and vit.rope_mixed else rotary


def has_movable_positions(vit: Any) -> bool:
    """Whether `moved_rotation` can be had."""
    from timm.layers import RotaryEmbeddingDinoV3

    return isinstance(getattr(vit, "rope", None), RotaryEmbeddingDinoV3)


def moved_rotation(vit: Any, grid: tuple[int, int], shift: Tensor, factor: Tensor) -> Tensor:
    """Rotary table of DINOv3's kind for patches at moved coordinates, (N, 2 d): all sines, then all cosines.

    Patch centers lie in [-1, 1] along the axes (row, column); they become (center + shift) * factor.

    Args:
        vit: one that `has_movable_positions`.
        grid: (rows, columns) of patches.
        shift, factor: (2,).
    """
    import torch

    rope = vit.rope
    whole = {"separate": grid, "min": (min(grid),) * 2, "max": (max(grid),) * 2}[rope.normalize_coords]
    axes = [
        (torch.arange(count, device=shift.device, dtype=torch.float32) + 0.5) / size * 2 - 1
        for count, size in zip(grid, whole, strict=True)
    ]
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)  # (N, 2)
    sin, cos = rope._get_pos_embed_from_coords((coords + shift) * factor)
    return torch.cat([sin, cos], dim=-1)


def blocks(vit: Any) -> Iterable[Any]:
    """The blocks, first to last."""
    found: Iterable[Any] = vit.blocks
    return found


def has_class_token(vit: Any) -> bool:
    """Whether the first token of a stream is one."""
    return vit.cls_token is not None


def let_key_biases_follow(vit: Any) -> None:
    """Let buffers of zeros that stand for the biases of keys have the type of the biases beside them.

    Engines cast parameters to bf16 and leave buffers alone; timm joins the two, and no layer takes what comes of it.
    """
    for module in vit.modules():
        if getattr(module, "k_bias", None) is not None and getattr(module, "q_bias", None) is not None:
            module.register_forward_pre_hook(_key_bias_follows)


def _key_bias_follows(attention: Any, _: Any) -> None:
    if attention.k_bias.dtype != attention.q_bias.dtype:
        attention.k_bias = attention.k_bias.to(attention.q_bias.dtype)


def has_known_branches(block: Any) -> bool:
    """Whether `attention_branch` and `mlp_branch` know a block's two branches."""
    from timm.layers import Attention, AttentionRope
    from timm.models.eva import EvaAttention, EvaBlock
    from timm.models.vision_transformer import Block

    attention = getattr(block, "attn", None)
    known = type(block) in (Block, EvaBlock) and type(attention) in (Attention, AttentionRope, EvaAttention)
    return known and getattr(attention, "num_kv_groups", 1) == 1


def require_packable(block: Any) -> None:
    """Refuse blocks whose two branches `attention_branch` and `mlp_branch` do not know.

    Raises:
        BackboneError: it is one.
    """
    if not has_known_branches(block):
        attention = type(getattr(block, "attn", None)).__name__
        raise BackboneError(
            f"blocks of kind {type(block).__name__} with {attention} cannot run crops of several sizes in one pass; "
            "use a plain pre-norm ViT"
        )


def attention_branch(
    block: Any, tokens: Tensor, shapes: Sequence[torch.Size], rotary: Sequence[Tensor | None]
) -> Tensor:
    """What a block's attention adds to the token streams of crops of several sizes, before any stochastic depth.

    Args:
        block: one that `require_packable` takes.
        tokens: (T, D), the streams flattened and one after the other.
        shapes: (samples, P + N, D) of each.
        rotary: table of each.
    """
    import torch
    from torch.nn import functional

    attention = block.attn
    normed = block.norm1(tokens)
    query, key, value = _query_key_value(attention, normed)
    attended = []
    sizes = [shape[0] * shape[1] for shape in shapes]
    dropout = attention.attn_drop.p if attention.training else 0.0
    for q, k, v, shape, table in zip(*(x.split(sizes) for x in (query, key, value)), shapes, rotary, strict=True):
        q, k, v = (x.view(shape[0], shape[1], attention.num_heads, -1).transpose(1, 2) for x in (q, k, v))
        q, k = _rotated(attention, attention.q_norm(q), table), _rotated(attention, attention.k_norm(k), table)
        heads = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        attended.append(heads.transpose(1, 2).flatten(2).flatten(0, 1))  # (samples (P + N), D)
    return _projected(block, torch.cat(attended), normed)


def class_attention_branch(block: Any, tokens: Tensor, rotary: Tensor | None) -> Tensor:
    """What a block's attention adds to class tokens, (B, 1, D) of streams (B, P + N, D), before any stochastic depth.

    Args:
        block: one that `has_known_branches`.
        tokens: a class token comes first.
        rotary: table of the block, which turns no class token.
    """
    from torch.nn import functional

    attention = block.attn
    normed = block.norm1(tokens)
    query, key, value = _query_key_value(attention, normed)
    heads = (x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for x in (query[:, :1], key, value))
    q, k, v = heads  # (B, H, 1, d), (B, H, P + N, d), (B, H, P + N, d)
    k = _rotated(attention, attention.k_norm(k), rotary)
    dropout = attention.attn_drop.p if attention.training else 0.0
    attended = functional.scaled_dot_product_attention(attention.q_norm(q), k, v, dropout_p=dropout)
    return _projected(block, attended.transpose(1, 2).flatten(2), normed[:, :1])


def _query_key_value(attention: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of tokens (..., D), each (..., D) with the heads side by side."""
    import torch
    from torch.nn import functional

    if getattr(attention, "qkv", None) is None:
        return attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
    if getattr(attention, "q_bias", None) is None:
        query, key, value = attention.qkv(normed).chunk(3, dim=-1)
    else:  # keys without bias, for which timm has a buffer of zeros
        bias = torch.cat([attention.q_bias, attention.k_bias.to(attention.q_bias), attention.v_bias])
        query, key, value = functional.linear(normed, attention.qkv.weight, bias).chunk(3, dim=-1)
    return query, key, value


def _rotated(attention: Any, heads: Tensor, table: Tensor | None) -> Tensor:
    """(samples, H, P + N, d) with all but the prefix turned."""
    import torch
    from timm.layers import apply_rot_embed_cat

    if table is None:
        return heads
    num_prefix, half = attention.num_prefix_tokens, attention.rotate_half
    turned = apply_rot_embed_cat(heads[:, :, num_prefix:], table, half=half)
    return torch.cat([heads[:, :, :num_prefix], turned], dim=2).type_as(heads)


def _projected(block: Any, attended: Tensor, normed: Tensor) -> Tensor:
    """What attention adds to the tokens that `normed` (..., D) was made of, from its heads side by side."""
    attention = block.attn
    joined = attention.norm(attended)
    if getattr(attention, "gate", None) is not None:
        joined = joined * attention.gate(normed).sigmoid()
    return _scaled(block, 1, attention.proj_drop(attention.proj(joined)))


def mlp_branch(block: Any, tokens: Tensor) -> Tensor:
    """What a block's MLP adds to tokens (T, D), before any stochastic depth."""
    return _scaled(block, 2, block.mlp(block.norm2(tokens)))


def _scaled(block: Any, branch: int, added: Tensor) -> Tensor:
    """LayerScale, which one of timm's classes has as a module and the other as a parameter."""
    if hasattr(block, f"ls{branch}"):
        scaled: Tensor = getattr(block, f"ls{branch}")(added)
        return scaled
    gamma = getattr(block, f"gamma_{branch}")
    return added if gamma is None else gamma * added


def block_outputs(vit: Any, tokens: Tensor, rotary: Tensor | None, *, class_only: bool = False) -> Iterator[Tensor]:
    """The token stream (B, P + K, D) after each block; after the last one (B, 1, D) if it is the class token alone."""
    import torch
    from torch.utils.checkpoint import checkpoint

    recompute = vit.grad_checkpointing and torch.is_grad_enabled()
    for depth, block in enumerate(vit.blocks):
        table = rotary_at(vit, rotary, depth)
        extra: dict[str, Any] = {} if table is None else {"rope": table}
        if class_only and depth == len(vit.blocks) - 1:
            extra["class_only"] = True
        tokens = checkpoint(block, tokens, use_reentrant=False, **extra) if recompute else block(tokens, **extra)
        yield tokens


def final_norm(vit: Any, tokens: Tensor) -> Tensor:
    """The norm after the last block, (B, P + K, D)."""
    normed: Tensor = vit.norm(tokens)
    return normed


def last_keys(vit: Any, tokens: Tensor, rotary: Tensor | None) -> Tensor | None:
    """Keys of the last block's attention, before rotary positions, the heads side by side.

    Args:
        vit: a plain ViT.
        tokens, rotary: as for `block_outputs`.

    Returns:
        (B, P + K, D); None with a block of a kind that is not known.
    """
    *_, last = blocks(vit)
    if not has_known_branches(last):
        return None
    for stream in islice(block_outputs(vit, tokens, rotary), len(vit.blocks) - 1):
        tokens = stream
    _, keys, _ = _query_key_value(last.attn, last.norm1(tokens))
    heads: Tensor = last.attn.k_norm(keys.unflatten(2, (last.attn.num_heads, -1)))  # (B, P + K, H, d)
    return heads.flatten(2)


def class_attention(vit: Any, tokens: Tensor, rotary: Tensor | None) -> Tensor | None:
    """Attention of the class token in the last block.

    Args:
        vit: a plain ViT.
        tokens, rotary: as for `block_outputs`.

    Returns:
        (B, H, P + K) that sum to 1; None without a class token or with attention of another kind than timm's plain one.
    """
    import torch
    from timm.layers import Attention

    attention = getattr(vit.blocks[-1], "attn", None)
    if vit.cls_token is None or not isinstance(attention, Attention):
        return None
    inputs: list[Tensor] = []  # a hook sees them whether the block has its norm before or after the attention
    hook = attention.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        for _ in block_outputs(vit, tokens, rotary):
            pass
    finally:
        hook.remove()
    query, keys, _ = attention.qkv(inputs[0]).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)  # (B, P + K, H, d)
    query, keys = attention.q_norm(query[:, 0]), attention.k_norm(keys)
    scores = torch.einsum("bhd,bthd->bht", query, keys) * attention.scale
    return scores.softmax(-1)
