from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from objectives.distributed import gather_rows, mean_over_ranks, num_ranks, rank, sum_over_ranks
from objectives.health import effective_rank, entropy, patch_cosine, projection_std, used_share


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


# Health


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (7, 7)])
def test_effective_rank__equals_the_formula(generator, shape):
    features = 2 + torch.randn(shape, generator=generator)
    singular = torch.linalg.svdvals(features.double())
    share = singular / singular.sum() + 1e-7
    assert effective_rank(features).item() == pytest.approx(math.exp(-(share * share.log()).sum().item()), rel=1e-5)


def test_effective_rank__counts_directions(generator):
    basis = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
    for count in (1, 3, 8):
        features = basis[:count].repeat(16 // count + 1, 1)[: 16 - 16 % count]
        assert effective_rank(features).item() == pytest.approx(count, rel=1e-3)
    assert effective_rank(torch.zeros(8, 4)).item() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_effective_rank__features_that_are_not_finite_have_none_and_stop_nothing(bad):
    features = torch.randn(8, 4)
    features[3, 1] = bad
    assert effective_rank(features).isnan()


def test_effective_rank__rotation_and_scale_do_not_matter(generator):
    features = torch.randn(12, 16, generator=generator)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    assert effective_rank(100 * features @ rotation).item() == pytest.approx(effective_rank(features).item(), rel=1e-5)


def test_effective_rank__at_most_256_rows_and_no_gradient(generator):
    features = torch.randn(300, 8, generator=generator, requires_grad=True)
    assert effective_rank(features).item() == pytest.approx(effective_rank(features[:256]).item())
    assert not effective_rank(features).requires_grad


def test_effective_rank__bf16_under_autocast(generator):
    features = torch.randn(16, 32, generator=generator).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert effective_rank(features).item() == pytest.approx(effective_rank(features.float()).item(), rel=1e-5)


def test_patch_cosine__equals_a_slow_loop(generator):
    patches = torch.randn(3, 6, 4, generator=generator)
    cosines = [
        torch.nn.functional.cosine_similarity(image[i], image[j], dim=0).item()
        for image in patches for i in range(6) for j in range(6) if i != j
    ]  # fmt: skip
    assert patch_cosine(patches).item() == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
    assert patch_cosine(torch.ones(2, 5, 3)).item() == pytest.approx(1)
    assert patch_cosine(torch.ones(2, 1, 3)).item() == pytest.approx(0, abs=1e-6)


def test_entropy__bounds_and_zeros():
    assert entropy(torch.full((2, 8), 1 / 8)).tolist() == pytest.approx([math.log(8)] * 2)
    assert entropy(torch.tensor([0.0, 1.0, 0.0])).item() == 0
    assert entropy(torch.tensor([0.5, 0.5]).bfloat16()).dtype == torch.float32


def test_used_share__counts_best_prototypes():
    scores = torch.tensor([[9.0, 1, 0, 0], [8, 1, 0, 0], [0, 0, 1, 0]])
    assert used_share(scores).item() == pytest.approx(2 / 4)
    assert used_share(scores.view(1, 3, 4)).item() == pytest.approx(2 / 4)


def test_projection_std__healthy_and_collapsed(generator):
    healthy = torch.randn(500, 64, generator=generator)
    assert projection_std(healthy).item() == pytest.approx(1 / 8, rel=0.03)
    assert projection_std(healthy * torch.rand(500, 1) * 9).item() == pytest.approx(1 / 8, rel=0.03)
    assert projection_std(torch.ones(5, 4)).item() == 0


# Collectives


def test_distributed__without_a_group_everything_is_itself():
    x = torch.randn(3, 2, requires_grad=True)
    assert (num_ranks(), rank()) == (1, 0)
    assert sum_over_ranks(x) is x
    assert torch.equal(gather_rows(x), x)
    mean = mean_over_ranks(x)
    assert torch.equal(mean, x)
    assert mean is not x and not mean.requires_grad


def _on_rank(number, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=number, world_size=2)
    x = (torch.arange(6.0).view(3, 2) + 10 * number).T.requires_grad_()  # not contiguous
    total = sum_over_ranks(x)
    (total * (number + 1)).sum().backward()
    outcome = (num_ranks(), rank(), mean_over_ranks(x), gather_rows(x), total.detach(), x.grad)
    torch.save(outcome, f"{results}.{number}")
    dist.destroy_process_group()


def test_distributed__two_ranks(tmp_path):
    torch.multiprocessing.spawn(_on_rank, (tmp_path / "meet", tmp_path / "out"), nprocs=2)
    own = [torch.arange(6.0).view(3, 2).T + 10 * number for number in range(2)]
    for number in range(2):
        world, place, mean, rows, total, gradient = torch.load(tmp_path / f"out.{number}")
        assert (world, place) == (2, number)
        assert torch.equal(mean, (own[0] + own[1]) / 2)
        assert torch.equal(rows, torch.cat(own))
        assert torch.equal(total, own[0] + own[1])
        assert torch.equal(gradient, torch.full((2, 3), 3.0))  # 1 from rank 0's loss and 2 from rank 1's
