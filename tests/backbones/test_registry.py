from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from backbones import load_backbone, registry, save_backbone
from backbones.encoder import Encoder
from backbones.errors import BackboneError
from backbones.features import Features
from backbones.images import build
from backbones.registry import create_backbone, from_spec

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def tiny_plugin(**arguments):
    return VisionTransformer(patch_size=8, img_size=16, embed_dim=16, depth=1, num_heads=2, **arguments)


def test_create_backbone__takes_the_models_own_sizes():
    backbone = create_backbone("vit_tiny_patch16_224", options=TINY)
    assert (backbone.image_size, backbone.patch_size, backbone.grid) == (224, 16, (14, 14))
    assert (backbone.embed_dim, backbone.in_chans, backbone.num_prefix_tokens) == (32, 3, 1)
    assert sum(p.numel() for n, p in backbone.named_parameters() if "head" in n) == 0


def test_spec__json_round_trip_rebuilds_the_architecture():
    options = TINY | {"reg_tokens": 2, "class_token": False, "drop_path_rate": 0.1}
    backbone = create_backbone(
        "vit_tiny_patch16_224", image_size=20, patch_size=5, in_chans=2, options=options,
        pixel_mean=[0.1, 0.2], pixel_std=[0.3, 0.4],
    )  # fmt: skip
    again = from_spec(json.loads(json.dumps(backbone.spec)))
    assert again.spec == backbone.spec
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in backbone.state_dict().items()}
    torch.testing.assert_close(again.pixel_std, backbone.pixel_std)


def test_from_spec__wrong_keys_are_named():
    spec = create_backbone("vit_tiny_patch16_224", image_size=32, patch_size=16, options=TINY).spec
    with pytest.raises(BackboneError, match="options"):
        from_spec({key: value for key, value in spec.items() if key != "options"})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_tiny_patch16_225", {}, "vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224", {"options": {"img_size": 32}}, "use backbone.image_size"),
        ("vit_tiny_patch16_224", {"options": {"num_classes": 10}}, "leave it out"),
        ("vit_tiny_patch16_224", {"options": {"dept": 3}}, "dept"),
        ("vit_tiny_patch16_224", {"options": {"embed_dim": 30, "num_heads": 4}}, "embed_dim=30"),
        ("vit_tiny_patch16_224", {"image_size": 33, "patch_size": 4}, "33 is not a multiple of patch_size 4"),
        ("vit_tiny_patch16_224", {"image_size": (32, 64)}, "32 x 64 is not square"),
        ("vit_tiny_patch16_224", {"in_chans": 4}, "pixel_mean .* must hold 4 numbers"),
        ("vit_tiny_patch16_224", {"pixel_std": [1.0, 0.0, 1.0]}, "pixel_std .* positive"),
    ],
)
def test_create_backbone__rejections_are_one_clear_line(name, arguments, message):
    arguments = arguments if "options" in arguments else {"options": TINY} | arguments
    arguments = {} if name != "vit_tiny_patch16_224" else arguments
    with pytest.raises(BackboneError, match=message) as caught:
        create_backbone(name, **arguments)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_create_backbone__builds_plugins_with_timms_arguments(monkeypatch):
    point = EntryPoint("tiny_plugin", "plug.models:tiny_plugin", "pretrain.backbones")
    monkeypatch.setattr(EntryPoint, "load", lambda self: tiny_plugin)
    monkeypatch.setattr(build, "plugins", lambda: {"tiny_plugin": point})
    monkeypatch.setattr(build, "model_names", lambda: ("tiny_plugin",))
    backbone = create_backbone("tiny_plugin")
    assert backbone.spec["library"] == "plug.models:tiny_plugin"
    assert backbone.features(torch.zeros(1, 3, 16, 16)).patches.shape == (1, 4, 16)


@dataclass
class SeriesConfig:
    kind: str = "series"
    name: str = "mean"
    dim: int = 4


class SeriesEncoder(Encoder):
    """The least that an encoder of another kind has."""

    kind = "series"
    Config = SeriesConfig

    def __init__(self, config: SeriesConfig) -> None:
        super().__init__(config)
        self.embed_dim = config.dim
        self.embed = torch.nn.Conv1d(1, config.dim, 2, stride=2)

    def tokens(self, batch: torch.Tensor) -> Features:
        tokens = self.embed(batch).mT  # (B, N, D)
        return Features(tokens, None, None, (tokens.shape[1],))


class WrongKind(SeriesEncoder):
    kind = "sound"


class NoConfig(Encoder):
    kind = "series"

    def tokens(self, batch: torch.Tensor) -> Features:
        raise NotImplementedError


@pytest.fixture
def plugin_kind(monkeypatch):
    """Makes a class the entry "series" of the group, beside a builder of images."""

    def install(found: object) -> None:
        loaded = {"series": found, "tiny_plugin": tiny_plugin}
        points = {name: EntryPoint(name, f"plug.models:{name}", "pretrain.backbones") for name in loaded}
        monkeypatch.setattr(EntryPoint, "load", lambda self: loaded[self.name])
        for module in (registry, build):
            monkeypatch.setattr(module, "plugins", lambda: points)
        monkeypatch.setattr(build, "model_names", lambda: tuple(points))

    return install


def test_kinds__a_plugin_s_encoder_is_built_saved_and_loaded(plugin_kind, tmp_path):
    plugin_kind(SeriesEncoder)
    assert {"image", "series", "voxels"} <= set(registry.kinds())
    assert registry.config_class("series") is SeriesConfig
    encoder = registry.from_config(SeriesConfig(dim=6))
    assert create_backbone("mean", kind="series", dim=6).spec == encoder.spec
    assert encoder.spec["library"].endswith(":SeriesEncoder") and encoder.network is encoder
    save_backbone(tmp_path / "backbone.safetensors", encoder.weights(), encoder.spec)
    loaded = load_backbone(tmp_path)
    assert isinstance(loaded, SeriesEncoder) and not loaded.training
    x = torch.randn(2, 1, 8)
    assert torch.equal(loaded.tokens(x).pooled, encoder.tokens(x).pooled)
    with pytest.raises(BackboneError, match=r"'mean' does not say which layers it has; set optimizer\.layer_decay=1"):
        encoder.layer_ids()


def test_kinds__mistakes_are_one_line(plugin_kind):
    plugin_kind(SeriesEncoder)
    for call, message in (
        (lambda: registry.config_class("sereis"), r"unknown kind .* series.*; did you mean 'series'\?$"),
        (lambda: registry.encoder_class("tiny_plugin"), r"builds image encoders .* set backbone\.name=tiny_plugin"),
        (lambda: create_backbone("series"), r"'series' does not encode images; set backbone\.kind=series"),
        (lambda: create_backbone("mean", kind="series", width=3), r"kind 'series': .*unexpected .*'width'"),
    ):
        with pytest.raises(BackboneError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    plugin_kind(WrongKind)
    with pytest.raises(BackboneError, match=r"is of kind 'sound'; name its entry point like its kind"):
        registry.encoder_class("series")
    plugin_kind(NoConfig)
    with pytest.raises(BackboneError, match=r"needs a class attribute Config: a dataclass .* kind: str and name: str"):
        registry.encoder_class("series")


def test_from_spec__kind_that_is_not_installed_is_named(plugin_kind):
    plugin_kind(SeriesEncoder)
    spec = registry.from_config(SeriesConfig()).spec | {"kind": "sound", "library": "their.models:Sound"}
    with pytest.raises(BackboneError, match=r"of kind 'sound' is not installed .* their\.models:Sound, .* their$"):
        from_spec(spec)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_create_backbone__patch_drop_rate_is_refused(name):
    with pytest.raises(BackboneError, match=r"'patch_drop_rate' 0\.5 has no effect, .* leave it out"):
        create_backbone(name, options={"patch_drop_rate": 0.5})
