"""Order of the data: exact mixtures, whole epochs, random access, one order for every world size, and no silent change."""

import random

import numpy as np
import pytest

from components.data.order import BLOCK, Draw, Mixture, deal
from components.errors import RecipeError


def test_weights_hold_exactly_in_every_block() -> None:
    mixture = Mixture([0.95, 0.04, 0.01], [10_000, 77, 13], seed=3)
    for block in (0, 1, 2, 5_000):
        drawn = [mixture.draw(slot).source for slot in range(block * BLOCK, (block + 1) * BLOCK)]
        assert np.bincount(drawn).tolist() == [950, 40, 10]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [2.0, 3.0, 5.0, 7.0, 11.0], [1e-9, 1e-9], [665e3, 1e3]])
def test_quotas_are_the_shares_rounded_and_fill_the_block(weights: list[float]) -> None:
    quotas = Mixture(weights, [10] * len(weights), seed=0).quotas
    assert quotas.sum() == BLOCK
    assert (abs(quotas - np.array(weights) / sum(weights) * BLOCK) < 1).all()


def test_a_weight_that_would_never_be_drawn_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"weight 1.0 of 3001.0 is less than one sample in 1000 .* Raise it"):
        Mixture([3000.0, 1.0], [10, 10], seed=0)


def test_every_sample_once_an_epoch_and_another_order_in_each() -> None:
    sizes = [37, 100]
    mixture = Mixture([0.3, 0.7], sizes, seed=1)
    drawn: dict[tuple[int, int], list[int]] = {}
    for slot in range(4 * BLOCK):
        draw = mixture.draw(slot)
        drawn.setdefault((draw.source, draw.epoch), []).append(draw.index)
    for source, size in enumerate(sizes):
        epochs = [order for (of, _), order in sorted(drawn.items()) if of == source]
        assert len(epochs) > 10
        assert all(sorted(order) == list(range(size)) for order in epochs[:-1])  # the last one is still under way
        assert len(set(map(tuple, epochs))) == len(epochs)
        assert epochs[0] != sorted(epochs[0])


def test_draws_are_a_function_of_the_slot() -> None:
    def fresh() -> Mixture:
        return Mixture([0.6, 0.4], [50, 21], seed=7)

    walker = fresh()
    sequential = [walker.draw(slot) for slot in range(3_000)]
    slots = random.Random(0).sample(range(3_000), 500)
    jumper = fresh()
    assert [jumper.draw(slot) for slot in slots] == [sequential[slot] for slot in slots]
    assert [fresh().draw(slot) for slot in slots[:20]] == [sequential[slot] for slot in slots[:20]]


def test_the_seed_decides_the_order_and_what_is_random_in_samples() -> None:
    one, same, other = (Mixture([1.0, 2.0], [500, 500], seed) for seed in (1, 1, 2))
    assert [one.draw(slot) for slot in range(50)] == [same.draw(slot) for slot in range(50)]
    assert [one.draw(slot) for slot in range(50)] != [other.draw(slot) for slot in range(50)]
    assert one.sample_stream(9).random() == same.sample_stream(9).random()
    assert len({one.sample_stream(slot).random() for slot in range(100)} | {other.sample_stream(9).random()}) == 101


def test_the_order_of_a_seed_never_changes() -> None:
    """Runs resume by this order. A library that changes it must be seen here, not in a continued run."""
    mixture = Mixture([0.5, 0.3, 0.2], [100, 50, 10], seed=42)
    expected = {
        0: Draw(2, 0, 1), 1: Draw(0, 0, 74), 2: Draw(0, 0, 98), 3: Draw(2, 0, 7),
        999: Draw(0, 4, 35), 1_000: Draw(0, 5, 34), 123_456_789: Draw(0, 617_283, 8),
    }  # fmt: skip
    assert {slot: mixture.draw(slot) for slot in expected} == expected
    assert mixture.sample_stream(5).integers(2**32, size=3).tolist() == [4172699241, 2443773240, 3550152152]


def lengths_like_llava(count: int, seed: int) -> list[int]:
    """Most samples hold a picture and a few turns; some are much longer, some text only."""
    draws = np.random.default_rng(seed)
    text = np.minimum(draws.lognormal(4.8, 0.9, count), 1_400).astype(int)
    return (text + np.where(draws.random(count) < 0.06, 0, 576)).tolist()


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (4, 1), (1, 4), (4, 4), (16, 1), (8, 2), (32, 4)])
def test_deal_gives_every_sample_once_and_leaves_no_rank_without(ranks: int, micro_batches: int) -> None:
    lengths = lengths_like_llava(128, seed=ranks)
    dealt = deal(lengths, ranks, micro_batches)
    assert [len(hands) for hands in dealt] == [ranks] * micro_batches
    assert all(hand and hand == sorted(hand) for hands in dealt for hand in hands)
    assert sorted(sample for hands in dealt for hand in hands for sample in hand) == list(range(128))
    assert dealt == deal(list(lengths), ranks, micro_batches)


def test_deal_leaves_no_rank_without_a_sample_of_equal_or_no_length() -> None:
    assert all(len(hand) == 2 for hands in deal([0] * 16, 4, 2) for hand in hands)
    assert all(len(hand) == 1 for hands in deal([0, 10**6, 0, 1], 4, 1) for hand in hands)


@pytest.mark.parametrize(("ranks", "micro_batches", "worst"), [(8, 1, 1.02), (8, 4, 1.05), (2, 2, 1.01)])
def test_deal_balances_tokens(ranks: int, micro_batches: int, worst: float) -> None:
    """Ranks wait for the slowest in every micro-batch: what counts is the longest hand against the mean, over the step."""
    ratios = []
    for seed in range(20):
        lengths = lengths_like_llava(128, seed)
        loads = np.array([[sum(lengths[i] for i in hand) for hand in hands] for hands in deal(lengths, ranks, micro_batches)])
        ratios.append(loads.max(1).sum() / loads.mean(1).sum())
    assert np.mean(ratios) < worst, np.mean(ratios)
    print(f"{ranks} ranks, {micro_batches} micro-batches: slowest/mean {np.mean(ratios):.4f}")
