from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d, LayerNorm, LayerNorm2d
from torch import Tensor, nn

from backbones.decoder import MaskedDecoder
from backbones.norms import make_norms_exact
from backbones.registry import create_backbone

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def gradients(norm: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    norm.zero_grad()
    norm(x).backward(upstream.to(x.dtype))
    return {name: parameter.grad.double() for name, parameter in norm.named_parameters()}


@pytest.mark.parametrize("rows", [4160, 16384])
@pytest.mark.parametrize("kind", [nn.LayerNorm, LayerNorm, LayerNorm2d])
def test_make_norms_exact__gradients_of_bf16_layer_norms_on_a_cpu(kind, rows):
    """Torch's own sums them in bf16, which is off by a fifth and more."""
    generator = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(rows, 64, generator=generator), torch.randn(rows, 64, generator=generator) + 0.5
    if kind is LayerNorm2d:
        x, upstream = x[:, :, None, None], upstream[:, :, None, None]
    x, upstream = x.bfloat16(), upstream.bfloat16()
    norm = kind(64).bfloat16()
    expected = gradients(copy.deepcopy(norm).double(), x.double(), upstream.double())
    make_norms_exact(norm)
    assert isinstance(norm, kind) and norm(x).dtype == torch.bfloat16
    for name, gradient in gradients(norm, x, upstream).items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 0.005, f"{name}: {error:.4f}"  # the rounding of the result to bf16


@pytest.mark.parametrize("norm", [LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False), BatchNormAct2d(8)])
def test_make_norms_exact__nothing_changes_in_float32(norm):
    x = torch.randn(16, 8, 1, 1) if isinstance(norm, BatchNormAct2d) else torch.randn(16, 8)
    exact = copy.deepcopy(norm)
    make_norms_exact(exact)
    make_norms_exact(exact)  # twice is once
    again = copy.deepcopy(exact)
    for other in (exact, again):
        assert torch.equal(other(x.clone()), copy.deepcopy(norm)(x.clone()))
        assert other.state_dict().keys() == norm.state_dict().keys()
        assert other.weight is dict(other.named_parameters()).get("weight")


def test_make_norms_exact__batch_norms_of_bf16_weights_have_float32_statistics():
    norm = nn.BatchNorm2d(4)
    make_norms_exact(norm)
    for parameter in norm.parameters():  # as engines do: parameters, not buffers
        parameter.data = parameter.data.bfloat16()
    output = norm(torch.randn(2, 4, 3, 3).bfloat16())
    output.float().square().mean().backward()
    assert norm.running_var.dtype == torch.float32
    assert (output.dtype, norm._parameters["weight"].grad.dtype) == (torch.bfloat16, torch.bfloat16)


def test_features__gradients_of_every_norm_of_a_bf16_vit_and_its_decoder():
    """At 16 * 265 rows, all norms' gradients are near those of float32 weights of the same values."""
    torch.manual_seed(0)
    vit = create_backbone("vit_tiny_patch16_224", image_size=32, patch_size=2, options=TINY)
    vit.fix_sincos_positions()
    decoder = MaskedDecoder(32, vit.grid, 12, dim=32, depth=1, num_heads=2)
    half = nn.ModuleList([vit, decoder])
    for parameter in half.parameters():
        parameter.data = parameter.data.bfloat16()
    whole = copy.deepcopy(half)
    for parameter in whole.parameters():
        parameter.data = parameter.data.float()
    x = torch.randn(32, 3, 32, 32)
    keep_idx, drop_idx = torch.arange(192).expand(32, -1), torch.arange(192, 256).expand(32, -1)
    for encoder, head in (half, whole):
        head(encoder.features(x, keep_idx), keep_idx, drop_idx).float().sum().backward()
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    checked = 0
    for name, parameter in half.named_parameters():
        if "norm" in name and name.endswith("bias"):
            checked += 1
            error = (parameter.grad.float() - expected[name]).norm() / expected[name].norm()
            assert error < 0.06, f"{name}: {error:.3f}"
    assert checked == 8


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "fastvit_t8"])
def test_features__bf16_encoders_can_be_compiled(name, recwarn):
    settings = {"image_size": 16, "patch_size": 4, "options": TINY} if name.startswith("vit") else {"image_size": 64}
    torch.manual_seed(0)
    encoder = create_backbone(name, **settings)
    for parameter in encoder.parameters():
        parameter.data = parameter.data.bfloat16()
    encoder.eval()
    x = torch.randn(2, 3, encoder.image_size, encoder.image_size)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(encoder.features, backend=backend, fullgraph=False)
    tokens = compiled(x).tokens
    assert graphs, "nothing was traced"
    assert sum(len(graph.graph.nodes) for graph in graphs) > 50
    torch.testing.assert_close(tokens, encoder.features(x).tokens)
