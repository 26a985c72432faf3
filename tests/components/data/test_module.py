"""InstructionData: one order for every world size, validation, and refusals that name the remedy."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.trainer.states import TrainerFn

from components.data import InstructionData, LlavaConversations, Overrides, QuestionAnswers, Sample, ShapesWorld
from components.errors import RecipeError
from components.turns import Turn
from tests.components.data.small_data import SHAPES, assert_equal_batches, opened, shapes


class Texts(ShapesWorld):
    """Text-only samples of very unequal length."""

    def __init__(self, name: str, weight: float = 1.0) -> None:
        super().__init__(SHAPES, num_scenes=300, weight=weight)
        self.name = name

    def sample(self, index: int, random: np.random.Generator) -> Sample:
        return Sample(f"{self.name} {index}", [Turn("user", "how many"), Turn("assistant", "a " * (1 + index % 40))], [])

    def estimate(self, indices: np.ndarray, tokens_per_image: int) -> np.ndarray:
        return 3 + indices % 40


def ids_of_steps(data: InstructionData) -> list[list[str]]:
    """Samples of each optimizer step on this rank."""
    batches = list(data.train_dataloader())
    return [
        [name for batch in batches[first : first + data.micro_batches] for name in batch.sample_ids]
        for first in range(0, len(batches), data.micro_batches)
    ]


# --- order


def test_samples_of_a_step_do_not_depend_on_ranks_or_accumulation(tmp_path: Path) -> None:
    expected = [sorted(ids) for ids in ids_of_steps(opened({"shapes": shapes()}, tmp_path))]
    assert all(len(set(ids)) == 8 for ids in expected)
    assert len(set(map(tuple, expected))) == 6
    for ranks, accumulate in ((2, 1), (4, 1), (1, 2), (1, 8), (2, 4), (4, 2)):
        parts = [
            ids_of_steps(opened({"shapes": shapes()}, tmp_path, rank=rank, ranks=ranks, accumulate=accumulate))
            for rank in range(ranks)
        ]
        assert [sorted(name for part in parts for name in part[step]) for step in range(6)] == expected


def test_what_is_random_in_a_sample_does_not_depend_on_ranks_or_accumulation(tmp_path: Path) -> None:
    """The questions asked about a scene are drawn: by the slot, not by whoever prepares it."""

    def documents(**arguments: Any) -> dict[str, list[int]]:
        found = {}
        for batch in opened({"shapes": shapes(num_scenes=10)}, tmp_path, **arguments).train_dataloader():
            bounds = batch.cumulative_lengths.tolist()
            for name, (first, last) in zip(batch.sample_ids, pairwise(bounds), strict=True):
                found.setdefault(name, []).append(batch.input_ids[first:last].tolist())
        return {name: sorted(rows) for name, rows in found.items()}

    whole, halves = documents(), [documents(rank=rank, ranks=2, accumulate=2) for rank in range(2)]
    assert {name: sorted(halves[0].get(name, []) + halves[1].get(name, [])) for name in whole} == whole
    assert any(len({tuple(row) for row in rows}) > 1 for rows in whole.values())  # a scene is asked anew in every epoch


@pytest.mark.parametrize("step", [0, 4])
def test_workers_make_the_batches_that_the_main_process_makes(step: int, tmp_path: Path) -> None:
    sources = [{"a": shapes(validation_fraction=0.1), "b": shapes(seed=1, weight=0.5)} for _ in range(2)]
    alone, helped = (
        opened(source, tmp_path, accumulate=2, step=step, num_workers=workers)
        for source, workers in zip(sources, (0, 2), strict=True)
    )
    ours, theirs = list(alone.train_dataloader()), list(helped.train_dataloader())
    assert len(ours) == len(theirs) == (6 - step) * 2
    for mine, other in zip(ours, theirs, strict=True):
        assert_equal_batches(mine, other)
    for mine, other in zip(alone.val_dataloader()[0], helped.val_dataloader()[0], strict=True):
        assert_equal_batches(mine, other)


def test_a_run_continues_with_the_batches_that_were_left(tmp_path: Path) -> None:
    whole = list(opened({"shapes": shapes()}, tmp_path, accumulate=2).train_dataloader())
    rest = list(opened({"shapes": shapes()}, tmp_path, accumulate=2, step=2).train_dataloader())
    for mine, other in zip(rest, whole[4:], strict=True):
        assert_equal_batches(mine, other)
    assert len(opened({"shapes": shapes()}, tmp_path, accumulate=2, step=2).train_dataloader()) == 12  # Lightning counts from 0


def test_a_mixture_draws_each_source_by_its_weight(tmp_path: Path) -> None:
    data = opened({"a": Texts("a", weight=3.0), "b": Texts("b")}, tmp_path, global_batch_size=500)
    data.trainer.max_steps = 2
    ids = [name for step in ids_of_steps(data) for name in step]
    assert [sum(name.startswith(prefix) for name in ids) for prefix in ("a", "b")] == [750, 250]


def test_ranks_carry_about_the_same_tokens(tmp_path: Path) -> None:
    ranks = [opened({"texts": Texts("text")}, tmp_path, rank=rank, ranks=4, global_batch_size=64) for rank in range(4)]
    tokens = np.array([[batch.num_tokens for batch in data.train_dataloader()] for data in ranks])
    assert (tokens.max(0) / tokens.mean(0) < 1.03).all(), tokens


# --- validation


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_validation_sees_every_held_out_sample_once_in_as_many_batches_on_every_rank(ranks: int, tmp_path: Path) -> None:
    loaders = []
    for rank in range(ranks):
        data = opened({"none": shapes(), "some": shapes(validation_fraction=0.11)}, tmp_path, rank=rank, ranks=ranks)
        assert data.validation_names == ["some"]
        loaders.append([batch.sample_ids for batch in data.val_dataloader()[0]])
    assert len({len(batches) for batches in loaders}) == 1
    seen = [name for batches in loaders for ids in batches for name in ids if name != "padding"]
    held_out = data.sources["some"].validation_indices
    assert sorted(seen) == sorted(f"scene {index}" for index in held_out)
    assert not {int(name.split()[1]) for name in seen} & set(
        data.sources["some"].train_indices(np.arange(data.sources["some"].num_samples)).tolist()
    )


def test_validation_is_the_same_every_time(tmp_path: Path) -> None:
    data = opened({"some": shapes(validation_fraction=0.2)}, tmp_path)
    later = opened({"some": shapes(validation_fraction=0.2)}, tmp_path, step=5)
    for mine, other in zip(data.val_dataloader()[0], later.val_dataloader()[0], strict=True):
        assert_equal_batches(mine, other)


# --- refusals


def test_a_global_batch_that_does_not_divide_names_the_three_numbers(tmp_path: Path) -> None:
    expected = r"data\.global_batch_size = 8 is not a multiple of 3 ranks x 2 accumulated micro-batches = 6"
    with pytest.raises(RecipeError, match=expected):
        opened({"shapes": shapes()}, tmp_path, ranks=3, accumulate=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "breif"}, r"data\.template = breif.*There is no template 'breif'\. Use one of: plain, vicuna_v1"),
        ({"max_length": 0}, "max_length = 0 must be at least 1"),
        ({"max_length": 4}, r"data\.template = brief.*longer than data\.max_length = 4"),
        ({"global_batch_size": 0}, "global_batch_size = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"num_workers": -1}, "num_workers = -1"),
        ({"max_bad_fraction": 1.0}, "max_bad_fraction = 1.0"),
    ],
)
def test_values_that_cannot_work_are_refused_at_the_start(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        opened({"shapes": shapes()}, tmp_path, **options)


def test_no_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="0 sources"):
        opened({}, tmp_path)


def test_a_source_that_cannot_be_opened_is_named(pictures: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.sources\.mine: There is no annotation file nowhere\.json"):
        opened({"fine": shapes(), "mine": LlavaConversations("nowhere.json", pictures)}, tmp_path)


def test_max_steps_must_be_stated(tmp_path: Path) -> None:
    data = opened({"shapes": shapes()}, tmp_path)
    data.trainer.max_steps = -1
    with pytest.raises(RecipeError, match="max_steps is not set"):
        data.train_dataloader()


def test_a_checkpoint_of_other_data_is_refused_with_the_difference(write, pictures: str, tmp_path: Path) -> None:
    rows = [{"image": f"p{i}.png", "text": f"{i}?", "answer": "yes"} for i in range(6)]
    file = write("q.jsonl", rows)

    def data(**options: Any) -> InstructionData:
        return opened({"qa": QuestionAnswers(file, pictures), "shapes": shapes()}, tmp_path, **options)

    state = json.loads(json.dumps(data().state_dict()))
    data().load_state_dict(state)
    data(num_workers=1, accumulate=2).load_state_dict(state)  # how it runs does not change the order
    validating = data(seed=1)
    validating.trainer.state.fn = TrainerFn.VALIDATING
    validating.load_state_dict(state)  # other data are welcome where no position is taken up
    with pytest.raises(RecipeError, match=r"seed: 0 -> 1.*--run NAME"):
        _flat(lambda: data(seed=1).load_state_dict(state))
    with pytest.raises(RecipeError, match=r"global_batch_size: 8 -> 4"):
        data(global_batch_size=4).load_state_dict(state)
    write("q.jsonl", rows[:-1])
    with pytest.raises(RecipeError, match=r"sources\.qa: .*6 samples \w+ -> .*5 samples"):
        data().load_state_dict(state)


def test_sources_in_another_order_are_other_data(tmp_path: Path) -> None:
    """The mixture draws by the place of a source."""
    state = json.loads(json.dumps(opened({"a": shapes(), "b": shapes(seed=1)}, tmp_path).state_dict()))
    with pytest.raises(RecipeError, match=r"sources: \['a', 'b'\] -> \['b', 'a'\]"):
        opened({"b": shapes(seed=1), "a": shapes()}, tmp_path).load_state_dict(state)


def test_a_checkpoint_does_not_read_the_data_again(tmp_path: Path) -> None:
    data = opened({"a": shapes()}, tmp_path)
    expected = data.state_dict()
    del data.sources["a"].shard_sizes
    assert data.state_dict() == expected


def _flat(call: Callable[[], None]) -> None:
    """Runs a call whose error has several lines, with the lines joined."""
    try:
        call()
    except RecipeError as error:
        raise RecipeError(" ".join(str(error).split("\n"))) from error


def test_start_up_says_what_the_mixture_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = opened({"a": shapes(weight=3.0), "b": shapes(num_scenes=12, seed=1)}, tmp_path)
    del data.mixture
    data.trainer.max_steps = 125
    data.setup("fit")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("data a: 300 samples of ShapesWorld")
    assert "75.0% of the mixture, 2.50 epochs in 125 steps" in lines[0]
    assert "25.0% of the mixture, 20.83 epochs in 125 steps" in lines[1]


# --- shares


def test_epochs_and_samples_take_their_share_of_the_run_and_weights_the_rest(tmp_path: Path) -> None:
    """6 steps of 500 are 3000 slots: two epochs of 300, 900 samples, and 1:4 of the other 1500."""
    sources = {
        "epochs": shapes(weight=None, epochs=2.0),
        "samples": shapes(weight=None, samples=900),
        "one": shapes(weight=1.0),
        "four": shapes(weight=4.0),
    }
    data = opened(sources, tmp_path, global_batch_size=500)
    assert data.mixture.drawn(3000).tolist() == [600, 900, 300, 1200]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"a": {"weight": None, "epochs": 20.0}}, r"a ask for 6,000 samples .* 12 steps; max_steps is 6\. Set it to 12"),
        ({"a": {"weight": None, "samples": 3000}, "b": {}}, r"leaves nothing for the sources with weights\. Raise max_steps"),
        ({"a": {"weight": None, "samples": 5}, "b": {}}, r"sources\.a asks for 5 .* would give 6\. Ask for a multiple of 3"),
        ({"a": {"weight": None, "samples": 300}, "b": {"weight": 0.0}}, r"all weights are 0 \(b\)"),
        ({"a": {"weight": 0.0}, "b": {"weight": 0.0}}, "State weights >= 0, and one of them > 0"),
    ],
)
def test_shares_that_cannot_be_had_are_refused(sources: dict[str, dict], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        opened({name: shapes(**options) for name, options in sources.items()}, tmp_path, global_batch_size=500)


def test_weights_may_change_where_the_run_has_not_been(tmp_path: Path) -> None:
    """A change of weights is a new segment: what was drawn stays, each source goes on where it was."""

    def data(step: int = 0, **options: Any) -> InstructionData:
        return opened({"a": shapes(), "b": shapes(seed=1)}, tmp_path, global_batch_size=20, step=step, **options)

    before = data(step=3)
    state = json.loads(json.dumps(before.state_dict()))
    changed = data(step=3, weight_changes={3: {"a": 0.1, "b": 0.9}, 5: {"a": 0.0}})
    changed.load_state_dict(state)
    assert changed.mixture.drawn(60).tolist() == before.mixture.drawn(60).tolist()
    assert ids_of_steps(data(weight_changes={3: {"a": 0.1}}))[:3] == ids_of_steps(data())[:3]
    counts = changed.mixture.drawn(120) - changed.mixture.drawn(100)
    assert counts.tolist() == [0, 20]
    later_source = {"a": shapes(), "b": shapes(seed=1, weight=0.0)}
    begins = opened(later_source, tmp_path, global_batch_size=20, weight_changes={2: {"b": 1.0}})
    assert begins.mixture.drawn(40).tolist() == [40, 0] and begins.mixture.drawn(120)[1] > 20
    later = json.loads(json.dumps(data(step=4, weight_changes={3: {"a": 0.1, "b": 0.9}}).state_dict()))
    with pytest.raises(RecipeError, match=r"shares from step 3: a 100/1000, b 900/1000 -> None.*data\.weight_changes"):
        _flat(lambda: data(step=4).load_state_dict(later))
    with pytest.raises(RecipeError, match=r"shares from step 2: None -> a 333/1000, b 667/1000"):
        _flat(lambda: data(step=3, weight_changes={2: {"b": 2.0}}).load_state_dict(state))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: {"a": 1.0}}, "step 0 must be at least 1"),
        ({2: {"c": 1.0}}, r"2: there is no source c\. Sources: a, b"),
        ({2: {"a": -1.0}}, r"2: a has weight -1\.0"),
        ({2: {"b": 1.0}}, r"2: b states epochs or samples"),
        ({6: {"a": 1.0}}, r"step 6 must be .* below max_steps = 6"),
        ({2: {}}, "2 names no source"),
    ],
)
def test_changes_of_weights_that_cannot_be_made_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    sources = {"a": shapes(), "b": shapes(weight=None, samples=30)}
    with pytest.raises(RecipeError, match=rf"data\.weight_changes: {message}"):
        opened(sources, tmp_path, weight_changes=changes, global_batch_size=500)


def test_a_source_may_be_prepared_in_its_own_way(write, pictures: str, tmp_path: Path) -> None:
    record = {"id": 1, "image": "p9.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}
    file = write("c.json", [record])
    plain, cropped = Overrides(template="plain"), Overrides(image_mode="crop")
    batches = [
        next(iter(opened({"a": LlavaConversations(file, pictures, overrides=own)}, tmp_path).train_dataloader()))
        for own in (Overrides(), plain, cropped)
    ]
    assert batches[1].num_tokens < batches[0].num_tokens == batches[2].num_tokens
    assert (batches[1].pixels == batches[0].pixels).all()
    assert (batches[2].pixels != batches[0].pixels).any()
    with pytest.raises(RecipeError, match=r"data\.sources\.a.*There is no template 'plane'"):
        opened({"a": LlavaConversations(file, pictures, overrides=Overrides(template="plane"))}, tmp_path)
