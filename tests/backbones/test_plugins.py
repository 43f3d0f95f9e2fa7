from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

from backbones.errors import BackboneError
from backbones.images import build
from backbones.plugins import by_name, load_entry, origin
from backbones.registry import create_backbone, from_spec


class Other:
    """Stands for an installed package."""

    name = "other-package"


def point(name: str, value: str = "some.module:thing") -> EntryPoint:
    return EntryPoint(name, value, "some.group")


class Network(nn.Module):
    """As plain as a plug-in's network may be; `build` takes no more than it must."""

    def __init__(self, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_chans, 6, 4, stride=4)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": "^stem", "blocks": "^blocks"}


@pytest.fixture
def plugin(monkeypatch):
    """Makes a function the plug-in "mine"."""

    def install(network) -> None:
        monkeypatch.setattr(EntryPoint, "load", lambda self: network)
        monkeypatch.setattr(build, "plugins", lambda: {"mine": point("mine")})
        monkeypatch.setattr(build, "model_names", lambda: ("mine",))

    return install


def test_by_name__says_who_has_a_name_that_is_claimed_again():
    assert list(by_name([point("a"), point("b")], "thing", {"c": "us"}, ValueError)) == ["a", "b"]
    with pytest.raises(ValueError, match=r"^thing 'c' of some\.module:thing is already taken by us; rename one"):
        by_name([point("a"), point("c")], "thing", {"c": "us"}, ValueError)
    with pytest.raises(ValueError, match=r"^thing 'a' of x:y is already taken by some\.module:thing; rename one"):
        by_name([point("a"), point("a", "x:y")], "thing", {}, ValueError)


def test_origin__names_the_package_where_it_is_known():
    assert origin(point("a")) == "some.module:thing"
    assert origin(point("a")._for(Other())) == "some.module:thing (package other-package)"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("value", "reason"), [("no_such_module:x", "No module named"), ("math:tau2", "no attribute")])
def test_load_entry__broken_plugin_is_one_line(value, reason):
    with pytest.raises(BackboneError, match=f"^backbone 'a': cannot import {value}: .*{reason}"):
        load_entry(point("a", value), "backbone", BackboneError)


def test_create_backbone__plugin_that_takes_no_keyword_of_timm(plugin):
    plugin(Network)
    backbone = create_backbone("mine", image_size=16)
    assert (backbone.grid, backbone.embed_dim, backbone.patch_size, backbone.has_cls) == ((4, 4), 6, 4, False)
    assert backbone.features(torch.zeros(2, 3, 8, 12)).patches.shape == (2, 6, 6)
    assert from_spec(backbone.spec).spec == backbone.spec
    with pytest.raises(BackboneError, match=r"'mine' cannot be built with .*depth=3.*unexpected .* 'depth'"):
        create_backbone("mine", image_size=16, options={"depth": 3})


def test_create_backbone__plugin_without_the_methods_is_refused(plugin):
    plugin(lambda in_chans: nn.Linear(in_chans, 1))
    with pytest.raises(BackboneError, match="'mine' is a Linear without forward_features and group_matcher"):
        create_backbone("mine", image_size=16)


def test_from_spec__plugin_that_is_not_installed_is_named(plugin):
    plugin(Network)
    spec = create_backbone("mine", image_size=16).spec | {"name": "theirs", "library": "their.backbones:theirs"}
    with pytest.raises(BackboneError, match=r"'theirs' is not installed here; .* their\.backbones:theirs, .* their$"):
        from_spec(spec)
