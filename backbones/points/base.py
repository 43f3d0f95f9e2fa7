"""What every encoder of point clouds is to objectives: how it groups points, and features of some or all groups.

`backbones.points.transformer.PointTransformer` is built in. A plug-in's subclass is one more `backbone.name` of kind
"points", see `backbones.registry`, and every objective of point clouds takes it. NOT here: how points are grouped
(`backbones.points.grouping`).

Legend: B batch, N points, G groups, K groups that run, S points of a group, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from backbones.encoder import Encoder
from backbones.errors import BackboneError
from backbones.features import Features
from backbones.points.config import PointTransformerConfig
from backbones.points.grouping import Groups, group

__all__ = ["PointEncoder"]


class PointEncoder(Encoder):
    """An encoder of point clouds, whose tokens are groups of neighboring points.

    Attributes:
        num_points: of the clouds that it is built for; it takes others, too.
        num_groups, group_size: G and S.
    """

    kind = "points"
    Config = PointTransformerConfig
    num_points: int
    num_groups: int
    group_size: int

    def __init__(self, config: Any) -> None:
        """`config` has `num_points`, `num_groups` and `group_size`.

        Raises:
            BackboneError: there are more groups, or points in a group, than points.
        """
        super().__init__(config)
        self.num_points, self.num_groups, self.group_size = config.num_points, config.num_groups, config.group_size
        for key in ("num_groups", "group_size"):
            if getattr(config, key) > config.num_points:
                raise BackboneError(
                    f"backbone {config.name!r}: {key} {getattr(config, key)} is more than num_points "
                    f"{config.num_points}; lower it"
                )

    def group(self, cloud: Tensor) -> Groups:
        """The groups of clouds (B, N, 3 or more), of which the positions count.

        Raises:
            BackboneError: a cloud has fewer points than there are groups, or points in one.
        """
        wanted = max(self.num_groups, self.group_size)
        if cloud.shape[1] < wanted:
            raise BackboneError(
                f"backbone {self.spec['name']!r} makes {self.num_groups} groups of {self.group_size} points; a cloud "
                f"of {cloud.shape[1]} points is too small"
            )
        return group(cloud[..., :3], self.num_groups, self.group_size)

    def grid_of(self, shape: Sequence[int]) -> tuple[int, ...]:
        """(G,), whatever the cloud; see `Encoder`."""
        return (self.num_groups,)

    @abstractmethod
    def features(self, groups: Groups, keep_idx: Tensor | None = None) -> Features:
        """Encodes groups, or only some of them.

        Args:
            groups: of clouds.
            keep_idx: (B, K) int64. Only these groups take part in attention, in this order; None: all.

        Returns:
            Tokens after the final norm, in the type of the weights: (B, G, D) or (B, K, D); `coords` are the centers of
            all groups.
        """

    def tokens(self, batch: Tensor) -> Features:
        """Features of clouds (B, N, 3 or more), a token for each group, in the order of farthest-point sampling."""
        return self.features(self.group(batch))
