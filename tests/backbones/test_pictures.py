"""Features as pictures: planted ones give known colors, and a picture does not change with the signs of components."""

from __future__ import annotations

import math

import torch

from backbones.images.pictures import (
    attention_maps,
    most_different_patch,
    principal_colors,
    similarity_maps,
    similarity_ranges,
)


def test_principal_colors__features_that_are_not_finite_are_black() -> None:
    patches = torch.randn(2, 16, 8)
    patches[1, 3, 5] = torch.nan
    assert torch.equal(principal_colors(patches, (4, 4)), torch.zeros(2, 3, 4, 4))


def test_principal_colors__tell_two_kinds_of_patches_apart() -> None:
    torch.manual_seed(0)
    is_left = torch.arange(4).lt(2).repeat(4)  # (16,) of a 4 x 4 grid
    patches = torch.randn(2, 16, 8) * 0.1 + torch.where(is_left, 1.0, -1.0)[None, :, None]
    colours = principal_colors(patches, (4, 4))
    assert colours.shape == (2, 3, 4, 4)
    red = colours[:, 0].flatten(1)
    assert (red[:, is_left].mean() - red[:, ~is_left].mean()).abs() > 0.8


def test_similarity_maps__are_bright_where_patches_are_like_the_one_in_the_middle() -> None:
    """On a grid of 3 x 5 with the middle at (1, 2), from the least to the greatest cosine of each picture."""
    patches = torch.tensor([0.0, 1.0]).repeat(2, 15, 1)  # orthogonal
    patches[:, 7] = torch.tensor([1.0, 0.0])  # the middle
    patches[0, 0], patches[0, 1] = torch.tensor([3.0, 0.0]), torch.tensor([-1.0, 0.0])  # 1 and -1
    patches[1, 14] = torch.tensor([0.125, math.sqrt(1 - 0.125**2)])
    patches[1, 13] = torch.tensor([0.015625, math.sqrt(1 - 0.015625**2)])  # an eighth of the range
    patches[1, 2] = torch.nan
    maps = similarity_maps(patches, (3, 5))
    assert maps.shape == (2, 3, 3, 5)
    violet, blue, yellow = (
        torch.tensor(color) for color in ((0.267, 0.004, 0.329), (0.231, 0.322, 0.545), (0.992, 0.906, 0.145))
    )
    assert maps[:, :, 1, 2].tolist() == [[1.0, 0.0, 0.0]] * 2
    for bright in (maps[0, :, 0, 0], maps[1, :, 2, 4]):
        torch.testing.assert_close(bright, yellow)
    torch.testing.assert_close(maps[1, :, 2, 3], (violet + blue) / 2)
    for dark in (maps[0, :, 0, 1], maps[1, :, 2, 0], maps[1, :, 0, 2]):
        torch.testing.assert_close(dark, violet)
    middle = torch.tensor([7, 7])
    torch.testing.assert_close(similarity_ranges(patches, middle), torch.tensor([[-1.0, 1.0], [0.0, 0.125]]))


def test_similarity_maps__of_patches_that_are_all_alike_have_more_than_one_color() -> None:
    """Cosines near 1 were one color; those that differ by rounding only still are."""
    angles = torch.linspace(0, 0.02, 9)
    nearly = torch.stack((angles.cos(), angles.sin()), 1)[None]  # (1, 9, 2)
    maps = similarity_maps(nearly, (3, 3)).flatten(2)[0].T  # (9, 3)
    assert maps[:, 1].amin() == 0 and maps[8, 1] < 0.1 and maps[3, 1] > 0.9, "the mark, violet and yellow"
    assert similarity_ranges(nearly, torch.tensor([4])).min() > 0.9999
    assert len(similarity_maps(torch.ones(1, 9, 2), (3, 3)).flatten(2)[0].T.unique(dim=0)) == 2, "and the mark"


def test_similarity_maps__of_one_patch_are_its_mark() -> None:
    assert similarity_ranges(torch.ones(1, 1, 4), torch.tensor([0])).tolist() == [[1.0, 1.0]]
    assert similarity_maps(torch.ones(1, 1, 4), (1, 1)).flatten().tolist() == [1.0, 0.0, 0.0]


def test_similarity_maps__to_the_patch_that_is_least_like_the_middle() -> None:
    """Of each picture its own one: opposite in one, orthogonal in the other."""
    patches = torch.tensor([1.0, 0.0]).repeat(2, 9, 1)
    patches[0, 2], patches[1, 6] = torch.tensor([-1.0, 0.0]), torch.tensor([0.0, 2.0])
    chosen = most_different_patch(patches, 4)
    assert chosen.tolist() == [2, 6]
    maps = similarity_maps(patches, (3, 3), chosen)
    is_marked = (maps == torch.tensor([1.0, 0.0, 0.0])[:, None, None]).all(1).flatten(1)  # (2, 9)
    assert is_marked.nonzero().tolist() == [[0, 2], [1, 6]]


def test_principal_colors__are_those_of_the_same_features_in_another_frame() -> None:
    """Scores, not axes, are shown: a rotation that keeps the largest loadings positive changes no color."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(3, 16, 6, generator=generator) * torch.tensor([9.0, 5.0, 3.0, 0.1, 0.1, 0.1])
    colors = principal_colors(patches, (4, 4))
    torch.testing.assert_close(principal_colors(patches.flip(2), (4, 4)), colors)
    torch.testing.assert_close(principal_colors(patches + 7, (4, 4)), colors)
    assert colors.amin() == 0 and colors.amax() == 1
    order = patches[..., 0].flatten().argsort()  # the first component is the channel that varies most, and its sign
    red = colors[:, 0].flatten()[order]
    assert red[0] == 0 and red[-1] == 1


def test_attention_maps__mean_of_heads_beside_the_greatest_of_the_picture() -> None:
    attention = torch.tensor([[[0.1, 0.3], [0.3, 0.5]]])  # one picture, two heads
    maps = attention_maps(attention, (1, 2))
    torch.testing.assert_close(maps, torch.tensor([0.5, 1.0]).expand(1, 3, 1, 2))
