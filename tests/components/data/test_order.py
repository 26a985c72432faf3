"""Order of the data: exact mixtures, whole epochs, random access, one order for every world size, and no silent change."""

import numpy as np
import pytest

from components.data.order import BLOCK, Draws, Mixture, Segment, Shards, deal
from components.errors import RecipeError
from tests.benchmarks.order import lookups
from tests.benchmarks.order import mixture as benchmark_mixture
from tests.benchmarks.packing import dealt, modelled_lengths, slowest_to_mean


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


def cases(count: int) -> list[np.random.Generator]:
    """Sources of randomness for properties, one a case: the number of a case that fails is in pytest's output. A third is quick."""
    randoms = [np.random.default_rng([2026, number]) for number in range(count)]
    quick = -(-count // 3)
    return [*randoms[:quick], *(pytest.param(random, marks=pytest.mark.slow) for random in randoms[quick:])]


def some_mixture(random: np.random.Generator, largest: int = 40) -> Mixture:
    """One to four sources of few shards, some of them empty, any windows, one to three segments of uneven length."""
    sources = int(random.integers(1, 5))
    shards = []
    for _ in range(sources):
        sizes = random.integers(0, largest, random.integers(1, 12)) * (random.random() < 0.8)
        sizes[random.integers(len(sizes))] += random.integers(1, 150)
        shards.append(Shards(sizes, window=int(random.integers(1, 6))))
    lengths = random.integers(1, 2_500, random.integers(0, 3))
    firsts = np.cumsum([0, *(lengths if random.random() < 0.5 else -(-lengths // BLOCK) * BLOCK)])  # some end with a block
    segments = []
    for first in firsts.tolist():
        weights = random.integers(0, 20, sources)
        weights[random.integers(sources)] += 1
        segments.append(Segment(first, tuple(weights.astype(float).tolist())))
    return Mixture(shards, segments, seed=int(random.integers(2**32)))


@pytest.mark.parametrize("random", cases(20))
def test_every_epoch_of_every_source_exactly_once_over_any_segments(random: np.random.Generator) -> None:
    """Draws of a source, in the order of slots, walk its epochs one after another; a cut anywhere is a prefix of that walk."""
    mixed = some_mixture(random)
    draws = mixed.draws(np.arange(mixed.segments[-1].first_slot + int(random.integers(2_500, 4_000))))
    for slot in (0, 1, *(segment.first_slot for segment in mixed.segments), BLOCK, 2_345, len(draws.source)):
        assert (mixed.drawn(slot) == np.bincount(draws.source[:slot], minlength=len(mixed.shards))).all()
    for source, shards in enumerate(mixed.shards):
        size = shards.sizes.sum()
        mine = draws.source == source
        assert (draws.epoch[mine] == np.arange(mine.sum()) // size).all()
        whole = mine.sum() // size * size
        epochs = draws.number[mine][:whole].reshape(-1, size)
        assert (np.sort(epochs, 1) == np.arange(size)).all()
        rest = draws.number[mine][whole:]
        assert len(set(rest.tolist())) == len(rest)
        assert len(rest) == 0 or (rest.min() >= 0 and rest.max() < size)


@pytest.mark.parametrize("random", cases(12))
def test_shares_hold_in_every_block_of_every_segment(random: np.random.Generator) -> None:
    mixed = some_mixture(random)
    firsts = [segment.first_slot for segment in mixed.segments]
    for segment, first, end in zip(mixed.segments, firsts, [*firsts[1:], firsts[-1] + 3_500], strict=True):
        weights = np.array(segment.weights)
        assert (abs(mixed.quotas_at(first) - weights / weights.sum() * BLOCK) < 1).all()
        assert (mixed.quotas_at(end - 1) == mixed.quotas_at(first)).all()
        for block in range(first, end - BLOCK + 1, BLOCK):
            drawn = np.bincount(mixed.draws(np.arange(block, block + BLOCK)).source, minlength=len(weights))
            assert (drawn == mixed.quotas_at(block)).all()


@pytest.mark.parametrize("random", cases(12))
def test_any_batching_of_slots_in_any_order_gives_the_same_draws(random: np.random.Generator) -> None:
    mixed = some_mixture(random)
    sequential = rows(mixed.draws(np.arange(4_000)))
    slots = random.permutation(4_000)[:1_000]
    cuts = np.sort(random.integers(0, 1_000, 10))
    fresh = Mixture(mixed.shards, mixed.segments, mixed.seed)
    assert [row for some in np.split(slots, cuts) for row in rows(fresh.draws(some))] == [sequential[slot] for slot in slots]
    doubled = np.repeat(slots[:20], 2)
    assert rows(fresh.draws(doubled)) == [sequential[slot] for slot in doubled]


@pytest.mark.parametrize("random", cases(5))
def test_far_slots_follow_from_draws_before_them(random: np.random.Generator) -> None:
    """Random access to slot 10^9 against counting: complete blocks hold their quota, so a source has drawn exactly so often."""
    mixed = some_mixture(random)
    last = mixed.segments[-1].first_slot
    before = np.bincount(mixed.draws(np.arange(last)).source, minlength=len(mixed.shards))
    blocks = 10**6
    draws = mixed.draws(np.arange(last + blocks * BLOCK, last + (blocks + 1) * BLOCK))
    for source, shards in enumerate(mixed.shards):
        first = before[source] + blocks * mixed.quotas_at(last)[source]
        mine = draws.source == source
        assert (draws.epoch[mine] == (first + np.arange(mine.sum())) // shards.sizes.sum()).all()


def test_more_slots_than_are_worked_on_at_once() -> None:
    mixed = mixture([Shards(np.full(50, 100), window=4)], 1.0)
    whole = mixed.draws(np.arange(20_000))
    assert rows(whole) == [row for first in range(0, 20_000, 1_000) for row in rows(mixed.draws(np.arange(first, first + 1_000)))]


@pytest.mark.parametrize("random", cases(40))
def test_windows_follow_one_another_and_span_no_more_shards_than_they_may(random: np.random.Generator) -> None:
    sizes = random.integers(0, 30, random.integers(2, 40))
    sizes[0] += 1
    window = int(random.integers(1, 10))
    draws = mixture([Shards(sizes, window)], 1.0, seed=int(random.integers(99))).draws(np.arange(2 * sizes.sum()))
    shards = np.repeat(np.arange(len(sizes)), sizes)[draws.number].reshape(2, -1)
    for shard in shards:
        last = {number: place for place, number in enumerate(shard.tolist())}
        together: set[int] = set()  # shards begun since all that were begun before were read to their end
        for place, number in enumerate(shard.tolist()):
            together.add(number)
            assert len(together) <= window
            if place == max(last[number] for number in together):
                together = set()
        assert not together


def test_epochs_shuffle_the_shards_and_the_members_anew() -> None:
    sizes = np.full(60, 20)
    draws = mixture([Shards(sizes, window=6)], 1.0, seed=5).draws(np.arange(3 * 1_200))
    epochs = draws.number.reshape(3, 1_200)
    windows = [[epoch[first : first + 120] // 20 for first in range(0, 1_200, 120)] for epoch in epochs]
    together = [{frozenset(window.tolist()) for window in of} for of in windows]
    assert all(len(window) == 6 for of in together for window in of)
    assert all((np.diff(window) == 0).mean() < 0.4 for of in windows for window in of)  # not one shard after the other
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert (epochs[one] == epochs[other]).mean() < 0.02
        assert not together[one] & together[other]  # other shards share a window


@pytest.mark.parametrize("random", cases(10))
def test_ranks_and_micro_batches_share_a_step_whatever_the_world_size(random: np.random.Generator) -> None:
    global_batch = 4 * int(random.integers(1, 9)) * 4
    mixed = some_mixture(random)
    step = int(random.integers(50))
    slots = np.arange(step * global_batch, (step + 1) * global_batch)
    expected = sorted(rows(mixed.draws(slots)))
    lengths = (mixed.draws(slots).number * 7 % 900 + 20).tolist()
    for ranks in (1, 2, 4):
        for micro_batches in {1, 2, 4, global_batch // ranks}:
            fresh = [Mixture(mixed.shards, mixed.segments, mixed.seed) for _ in range(ranks)]
            union = []
            for rank in range(ranks):  # each rank deals for itself and reads its own hands alone
                hands = [hands[rank] for hands in deal(list(lengths), ranks, micro_batches)]
                assert all(hands)
                union += [row for hand in hands for row in rows(fresh[rank].draws(slots[hand]))]
            assert sorted(union) == expected


def test_the_order_of_a_seed_never_changes() -> None:
    """Runs resume by this order. Whatever changes it must be seen here, not in a continued run."""
    shards = [Shards(np.array([40, 0, 25, 35, 300, 20]), window=2), *unsharded(50, 1_000_000)]
    mixed = Mixture(shards, [Segment(0, (0.5, 0.3, 0.2)), Segment(2_500, (0.0, 1.0, 1.0))], seed=42)
    expected = {
        0: (0, 0, 405), 1: (2, 0, 187840), 2: (0, 0, 271), 999: (0, 1, 256), 1_000: (0, 1, 238), 2_499: (0, 2, 84),
        2_500: (2, 0, 903581), 2_501: (2, 0, 76646), 123_456_789: (2, 61, 167727), 10**12 + 3: (1, 9999999990, 43),
    }  # fmt: skip
    assert {slot: rows(mixed.draws(np.array([slot])))[0] for slot in expected} == expected
    assert mixed.sample_stream(5).integers(2**32, size=3).tolist() == [4172699241, 2443773240, 3550152152]


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


@pytest.mark.parametrize(("ranks", "micro_batches"), [(8, 16), (128, 16)])
def test_deal_is_the_best_there_is_where_a_hand_is_one_sample(ranks: int, micro_batches: int) -> None:
    """The k-th slowest micro-batch cannot be faster than the (k x ranks)-th longest sample: what is left is the lengths' own."""
    lengths = lengths_like_llava(ranks * micro_batches, seed=1)
    slowest = [max(lengths[sample] for hand in hands for sample in hand) for hands in deal(lengths, ranks, micro_batches)]
    assert slowest == sorted(lengths, reverse=True)[::ranks]


def test_deal_balances_ranks_over_the_step_too() -> None:
    """Nodes of a hybrid mesh wait for one another once in a step: where all 128 ranks meet every time, 1.048 is the best."""
    lengths = abs(modelled_lengths()[: 128 * 16]).tolist()
    loads = np.array([[sum(lengths[i] for i in hand) for hand in hands] for hands in deal(lengths, 128, 16)])
    nodes = loads.reshape(16, 16, 8).max(2).sum(0)
    assert loads.sum(0).max() / loads.sum(0).mean() < 1.02
    assert nodes.max() / (loads.sum() / 128) < 1.03


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "micro_batches", "samples", "worst"),
    [(8, 1, 16, 1.03), (128, 1, 16, 1.03), (8, 16, 2, 1.05), (128, 16, 2, 1.05), (8, 16, 16, 1.05), (128, 16, 16, 1.05)],
)
def test_deal_keeps_what_the_benchmark_of_packing_states(ranks: int, micro_batches: int, samples: int, worst: float) -> None:
    steps = max(4, 100_000 // (ranks * micro_batches * samples))
    found = slowest_to_mean(modelled_lengths(), ranks, micro_batches, samples, steps, dealt, padded=False)
    assert found["padding"] == 0
    assert found["micro_step"] <= worst


@pytest.mark.slow
def test_memory_stays_flat_over_a_million_lookups() -> None:
    memory = [megabytes for _, _, megabytes in lookups(benchmark_mixture(), 10**6, stride=1, at_once=1_000)][1:]
    assert max(memory) - memory[0] < 1, memory


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
