from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from backbones import initialize_from, load_backbone, save_backbone, weights_digest
from backbones.errors import BackboneError
from backbones.images.positions import sincos_positions
from backbones.io import open_weights, read_shapes
from backbones.registry import create_backbone

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "reg_tokens": 2}


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", image_size=16, patch_size=4, options=SMALL)
    backbone.fix_sincos_positions()
    return backbone


@pytest.fixture
def checkpoint(tmp_path, backbone):
    """A checkpoint directory as the platform publishes it, with the digest of its one file."""
    file = tmp_path / "backbone.safetensors"
    save_backbone(file, backbone.timm_state_dict(), backbone.spec)
    record = {"files": {file.name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}}}
    (tmp_path / "checkpoint.json").write_text(json.dumps(record))
    return tmp_path


def test_load_backbone__same_features_from_directory_and_file(backbone, checkpoint, monkeypatch):
    monkeypatch.setattr(torch, "load", None)  # nothing may be unpickled
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = backbone.eval().features(x)
    for path in (checkpoint, checkpoint / "backbone.safetensors", str(checkpoint)):
        loaded = load_backbone(path)
        assert not loaded.training
        assert loaded.spec == backbone.spec
        features = loaded.features(x)
        for ours, theirs in ((features.patches, expected.patches), (features.registers, expected.registers)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_save_backbone__plain_timm_loads_it_strictly(backbone, checkpoint):
    plain = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=0, **SMALL).eval()
    plain.load_state_dict(load_file(checkpoint / "backbone.safetensors"), strict=True)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(plain.forward_features(x), backbone.eval().forward_features(x))


def test_load_backbone__tampered_file_is_refused(checkpoint):
    file = checkpoint / "backbone.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BackboneError, match="digest mismatch"):
        load_backbone(checkpoint)


def test_load_backbone__checkpoint_without_digest_is_refused(checkpoint):
    (checkpoint / "checkpoint.json").write_text('{"files": {}}')
    with pytest.raises(BackboneError, match=r"checkpoint\.json: no sha256"):
        load_backbone(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 200, -8])
def test_load_backbone__truncated_file_is_refused(checkpoint, keep):
    (checkpoint / "checkpoint.json").unlink()
    file = checkpoint / "backbone.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    for read in (load_backbone, weights_digest):
        with pytest.raises(BackboneError, match=r"backbone\.safetensors: "):
            read(file)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_read_shapes__of_what_open_weights_gives(tmp_path, name):
    weights = {"a": torch.zeros(2, 3), "b.c": torch.zeros(())}
    file = tmp_path / name
    torch.save({"state_dict": weights}, file) if name.endswith(".pth") else save_file(weights, file)
    assert read_shapes(file) == {"a": (2, 3), "b.c": ()}
    opened = open_weights(file)
    assert opened.keys() == {"a", "b.c"} and torch.equal(opened["a"], weights["a"])
    for content in (b"", b"something else than weights", file.read_bytes()[:-1]):
        file.write_bytes(content)
        with pytest.raises(BackboneError, match=rf"{name}: ") as refused:
            read_shapes(file)
        assert "\n" not in str(refused.value)
    file.unlink()
    with pytest.raises(BackboneError, match=rf"{name}: No such file or directory"):
        read_shapes(file)


def test_load_backbone__missing_path_and_foreign_file(tmp_path):
    with pytest.raises(BackboneError, match="no such file"):
        load_backbone(tmp_path)
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(BackboneError, match="architecture is unknown"):
        load_backbone(tmp_path / "other.safetensors")


def test_load_backbone__tensors_must_fit(tmp_path, backbone):
    file = tmp_path / "backbone.safetensors"
    tensors = backbone.timm_state_dict()
    tensors["cls_token"] = torch.zeros(1, 1, 8)
    tensors["extra"] = tensors.pop("norm.bias")
    save_backbone(file, tensors, backbone.spec)
    with pytest.raises(BackboneError) as caught:
        load_backbone(file)
    for part in ("cls_token has shape (1, 1, 8)", "extra is not part", "norm.bias is missing"):
        assert part in str(caught.value)


def test_weights_digest__is_about_content_not_layout(tmp_path, backbone, checkpoint):
    expected = weights_digest(checkpoint)
    assert len(expected) == 64
    reordered = dict(reversed(backbone.timm_state_dict().items()))
    save_backbone(tmp_path / "again.safetensors", reordered, dict(reversed(backbone.spec.items())))
    assert weights_digest(tmp_path / "again.safetensors") == expected

    changed = backbone.timm_state_dict() | {"norm.bias": torch.full((32,), 1e-7)}
    save_backbone(tmp_path / "changed.safetensors", changed, backbone.spec)
    assert weights_digest(tmp_path / "changed.safetensors") != expected
    other_pixels = backbone.spec | {"pixel_mean": [0.5, 0.5, 0.5]}
    save_backbone(tmp_path / "pixels.safetensors", backbone.timm_state_dict(), other_pixels)
    assert weights_digest(tmp_path / "pixels.safetensors") != expected
    half = {name: tensor.bfloat16() for name, tensor in backbone.timm_state_dict().items()}
    save_backbone(tmp_path / "half.safetensors", half, backbone.spec)
    assert weights_digest(tmp_path / "half.safetensors") != expected


def test_weights_digest__needs_no_torch(checkpoint):
    code = (
        f"import sys; from backbones import weights_digest; print(weights_digest({str(checkpoint)!r})); "
        "assert 'torch' not in sys.modules"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == weights_digest(checkpoint)


def other(size: int, **options: object):
    torch.manual_seed(1)
    return create_backbone("vit_tiny_patch16_224", image_size=size, patch_size=4, options=SMALL | options)


def test_initialize_from__same_architecture_is_taken_over_whole(backbone):
    encoder = other(16)
    done = initialize_from(encoder, backbone.weights())
    assert set(done.loaded) == encoder.weights().keys()
    assert done.resampled == done.missing == done.unexpected == ()
    assert all(torch.equal(tensor, backbone.weights()[name]) for name, tensor in encoder.weights().items())


def test_initialize_from__learned_positions_are_resampled_to_the_grid_and_prefixes_kept():
    source, encoder = other(16), other(24)
    with torch.no_grad():
        source.vit.pos_embed.normal_()
    done = initialize_from(encoder, source.weights())
    assert done.resampled == ("pos_embed",)
    assert len(done.loaded) == len(source.weights()) - 1
    own, given = encoder.vit.pos_embed, source.vit.pos_embed  # (1, 3 + 36, D), (1, 3 + 16, D)
    assert torch.equal(own[:, :3], given[:, :3])
    x = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(encoder.eval().features(x).tokens, source.eval().features(x).tokens)


def test_initialize_from__sincos_positions_of_another_grid_are_those_of_the_own_grid(backbone):
    for fixed in (True, False):
        encoder = other(24)
        if fixed:
            encoder.fix_sincos_positions()
        assert initialize_from(encoder, backbone.weights()).resampled == ("pos_embed",)
        torch.testing.assert_close(encoder.vit.pos_embed[0, 3:].detach(), sincos_positions(32, (6, 6)))
        assert isinstance(encoder.vit.pos_embed, torch.nn.Parameter) == (not fixed)


def test_initialize_from__names_what_is_missing_and_what_is_not_used(backbone):
    weights = backbone.weights() | {"head.weight": torch.zeros(10, 32)}
    del weights["norm.bias"]
    encoder = other(16)
    with torch.no_grad():
        encoder.vit.norm.bias.fill_(7.0)
    done = initialize_from(encoder, weights)
    assert (done.missing, done.unexpected) == (("norm.bias",), ("head.weight",))
    assert encoder.vit.norm.bias.eq(7.0).all()


def test_initialize_from__what_does_not_fit_is_refused_before_anything_is_copied(backbone):
    encoder = other(16, embed_dim=16)
    before = {name: tensor.clone() for name, tensor in encoder.weights().items()}
    with pytest.raises(BackboneError, match=r"do not fit .*has shape .*, not .* and \d+ more") as caught:
        initialize_from(encoder, backbone.weights())
    assert "\n" not in str(caught.value)
    with pytest.raises(BackboneError, match="none of their 1 names is one of its, such as cls_token"):
        initialize_from(encoder, {"stem.weight": torch.zeros(2)})
    with pytest.raises(BackboneError, match=r"pos_embed has shape \(1, 8, 16\)"):  # 5 patches are no square
        initialize_from(encoder, {"pos_embed": torch.zeros(1, 8, 16)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.weights().items())


def test_initialize_from__keeps_the_types_of_the_encoder(backbone):
    encoder = other(16).bfloat16()
    initialize_from(encoder, backbone.weights())
    assert {tensor.dtype for tensor in encoder.weights().values()} == {torch.bfloat16}
