import numpy
import torch
from scipy import stats

from edgekit.randomness import derive, integers, normal, uniform

SEEDS = derive(0, 1, samples=torch.arange(500))


def splitmix(state: int) -> int:
    """SplitMix64 in Python's unbounded integers, after the paper's listing."""
    mask = 2**64 - 1
    z = state & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_numbers_are_those_of_splitmix64():
    like = torch.empty(1, 3)
    seed = torch.tensor([123456789], dtype=torch.int64)
    expected = [(splitmix(123456789 + k * 0x9E3779B97F4A7C15) >> 40) / 2**24 for k in (1, 2, 3)]
    assert uniform(seed, like, 0, 1)[0].tolist() == expected


def test_a_sample_draws_the_same_in_any_batch():
    like = torch.empty(500, 3, 4, 4)
    whole = uniform(SEEDS, like, -1, 1)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert uniform(SEEDS[order], like, -1, 1).equal(whole[order])
    assert normal(SEEDS[7:8], like[:1]).equal(normal(SEEDS, like)[7:8])


def test_distributions():
    like = torch.empty(500, 100)
    assert stats.kstest(uniform(SEEDS, like, 0, 1).flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(normal(SEEDS, like).flatten().numpy(), "norm").pvalue > 1e-3
    drawn = integers(SEEDS, 100, 9)
    assert drawn.min() == 0
    assert drawn.max() == 8
    assert stats.chisquare(numpy.bincount(drawn.flatten().numpy())).pvalue > 1e-3


def test_purposes_epochs_and_seeds_do_not_share_numbers():
    index = torch.arange(1000)
    drawn = [derive(seed, purpose, epoch, samples=index) for seed in (0, 1) for purpose in (0, 1) for epoch in (0, 1)]
    assert torch.cat(drawn).unique().numel() == 8000


def test_no_global_generator_is_moved():
    before = torch.get_rng_state()
    uniform(SEEDS, torch.empty(500, 2), 0, 1)
    assert torch.get_rng_state().equal(before)
