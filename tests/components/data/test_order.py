"""Order of the data: exact mixtures, whole epochs, random access, one order for every world size, and no silent change."""

import numpy as np
import pytest

from components.data.order import BLOCK, Draws, Mixture, Segment, Shards, deal
from components.errors import RecipeError


def unsharded(*sizes: int) -> list[Shards]:
    return [Shards(np.array([size]), window=1) for size in sizes]


def mixture(shards: list[Shards], *weights: float, seed: int = 0) -> Mixture:
    return Mixture(shards, [Segment(0, weights)], seed)


def rows(draws: Draws) -> list[tuple[int, int, int]]:
    return list(zip(draws.source.tolist(), draws.epoch.tolist(), draws.number.tolist(), strict=True))


def test_weights_hold_exactly_in_every_block() -> None:
    mixed = mixture(unsharded(10_000, 77, 13), 0.95, 0.04, 0.01, seed=3)
    for block in (0, 1, 2, 5_000):
        drawn = mixed.draws(np.arange(block * BLOCK, (block + 1) * BLOCK)).source
        assert np.bincount(drawn).tolist() == [950, 40, 10]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 3.0, 5.0, 7.0, 11.0), (1e-9, 1e-9), (665e3, 1e3), (1.0, 0.0, 2.0)])
def test_quotas_are_the_shares_rounded_and_fill_the_block(weights: tuple[float, ...]) -> None:
    quotas = mixture(unsharded(*[10] * len(weights)), *weights).quotas_at(0)
    assert quotas.sum() == BLOCK
    assert (abs(quotas - np.array(weights) / sum(weights) * BLOCK) < 1).all()


@pytest.mark.parametrize("weights", [(3000.0, 1.0), (3000.0, 1.0, 0.5), (0.9999, 0.0, 0.0001)])
def test_a_weight_that_would_never_be_drawn_is_an_error_that_names_one_that_serves(weights: tuple[float, ...]) -> None:
    with pytest.raises(RecipeError, match=r"weight .* is less than one sample in 1000 .* Raise it to (\S+) or more") as error:
        mixture(unsharded(*[10] * len(weights)), *weights)
    least = float(str(error.value).split("Raise it to ")[1].split()[0])
    served = tuple(least if 0 < weight <= 1 and weight != max(weights) else weight for weight in weights)
    assert (mixture(unsharded(*[10] * len(weights)), *served).quotas_at(0) > 0).tolist() == [weight > 0 for weight in weights]


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, -0.5), (float("nan"), 1.0), (float("inf"), 1.0)])
def test_weights_of_nothing_are_an_error(weights: tuple[float, ...]) -> None:
    with pytest.raises(RecipeError, match="State weights >= 0"):
        mixture(unsharded(5, 5), *weights)


def test_a_source_without_samples_may_only_stand_with_weight_0() -> None:
    assert not mixture(unsharded(5, 0), 1.0, 0.0).draws(np.arange(3_000)).source.any()
    with pytest.raises(RecipeError, match="source 2 has no sample"):
        mixture(unsharded(5, 0), 1.0, 1.0)


def test_every_sample_once_an_epoch_and_another_order_in_each() -> None:
    sizes = [37, 100]
    drawn: dict[tuple[int, int], list[int]] = {}
    for source, epoch, number in rows(mixture(unsharded(*sizes), 0.3, 0.7, seed=1).draws(np.arange(4 * BLOCK))):
        drawn.setdefault((source, epoch), []).append(number)
    for source, size in enumerate(sizes):
        epochs = [order for (of, _), order in sorted(drawn.items()) if of == source]
        assert len(epochs) > 10
        assert all(sorted(order) == list(range(size)) for order in epochs[:-1])  # the last one is still under way
        assert len(set(map(tuple, epochs))) == len(epochs)
        assert epochs[0] != sorted(epochs[0])


def test_draws_are_a_function_of_the_slot() -> None:
    shards = [Shards(np.array([5, 0, 30, 15]), window=2), *unsharded(21)]
    sequential = rows(mixture(shards, 0.6, 0.4, seed=7).draws(np.arange(3_000)))
    slots = np.random.default_rng(0).permutation(3_000)[:500]
    jumper = mixture(shards, 0.6, 0.4, seed=7)
    assert [row for slot in slots for row in rows(jumper.draws(np.array([slot])))] == [sequential[slot] for slot in slots]
    assert rows(jumper.draws(slots)) == [sequential[slot] for slot in slots]
    assert rows(jumper.draws(np.empty(0, dtype=np.int64))) == []


def test_the_seed_decides_the_order_and_what_is_random_in_samples() -> None:
    one, same, other = (mixture(unsharded(500, 500), 1.0, 2.0, seed=seed) for seed in (1, 1, 2))
    slots = np.arange(50)
    assert rows(one.draws(slots)) == rows(same.draws(slots)) != rows(other.draws(slots))
    assert one.sample_stream(9).random() == same.sample_stream(9).random()
    assert len({one.sample_stream(slot).random() for slot in range(100)} | {other.sample_stream(9).random()}) == 101


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
