"""The assembled model: packing, freezing, parameter groups, steps without targets, validation and generation."""

import pytest
import torch
from lightning import Callback
from tiny import (
    ALL,
    DECODER_FROZEN,
    LLAMA,
    TOKENS_PER_IMAGE,
    TOWER,
    TOWER_FROZEN,
    Numbers,
    Prepared,
    Record,
    assert_equal,
    built_model,
    gradients,
    tiny_batch,
    tiny_document,
    tiny_documents,
    tiny_model,
    tiny_trainer,
    weights,
)
from torchmetrics import Metric

from components.batch import IMAGE_TOKEN_ID, pack
from components.decoder import HuggingFaceDecoder
from components.errors import RecipeError
from components.projector import MLP, Resampler
from components.tokenizer import WordTokenizer
from components.vlm import LearningRates

RATES = {"all": ALL, "tower_frozen": TOWER_FROZEN, "decoder_frozen": DECODER_FROZEN, "tower_only": LearningRates(vision_tower=1e-3)}


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
def test_packed_equals_one_document_at_a_time(rates):
    packed, single = built_model(rates), built_model(rates)
    loss = packed.loss_sum(tiny_batch())
    loss.backward()
    losses = [single.loss_sum(pack([document])) for document in tiny_documents()]
    sum(losses).backward()
    assert_equal({"loss": loss}, {"loss": sum(losses)})
    assert_equal(gradients(packed), gradients(single))
    assert losses[-1] == 0  # the document without targets


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
def test_without_pictures_every_trained_parameter_has_a_gradient(rates):
    model = built_model(rates)
    batch = pack([tiny_document(7), tiny_document(4)])
    loss = model.loss_sum(batch)
    loss.backward()
    for name, part in model.parts.items():
        for parameter in part.parameters():
            assert (parameter.grad is not None) == (getattr(rates, name) is not None)
            if name != "decoder" and parameter.grad is not None:
                assert not parameter.grad.any()
    with_pictures = built_model(rates)
    with torch.no_grad():  # whatever the stand-in picture gives, it does not count
        for parameter in with_pictures.vision_tower.parameters():
            parameter.mul_(2)
    assert with_pictures.loss_sum(batch) == loss


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
def test_frozen_parts(rates):
    model = built_model(rates)
    grad_modes = []
    model.vision_tower.register_forward_hook(lambda *arguments: grad_modes.append(torch.is_grad_enabled()))
    model.loss_sum(tiny_batch()).backward()
    assert grad_modes == [rates.vision_tower is not None]
    for name, part in model.parts.items():
        trained = getattr(rates, name) is not None
        assert all(module.training == trained for module in part.modules())
        assert all(parameter.requires_grad == trained for parameter in part.parameters())
        assert all((parameter.grad is not None) == trained for parameter in part.parameters())


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
def test_a_frozen_tower_keeps_nothing_for_the_backward_pass(rates):
    model = built_model(rates)
    kept, inside = [], []
    model.vision_tower.register_forward_pre_hook(lambda *arguments: inside.append(True))
    model.vision_tower.register_forward_hook(lambda *arguments: inside.clear())
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(bool(inside)) or tensor, lambda tensor: tensor):
        model.loss_sum(tiny_batch())
    assert any(kept) == (rates.vision_tower is not None)
    assert not all(kept)  # what comes after it keeps some in any case


def test_frozen_decoder_with_weights_of_its_own(tmp_path):
    """Reading weights makes new parameters, which must be frozen too."""
    built_model().decoder.lm.save_pretrained(tmp_path)
    model = built_model(DECODER_FROZEN, decoder=HuggingFaceDecoder(LLAMA, WordTokenizer(), weights=str(tmp_path)))
    assert not any(parameter.requires_grad for parameter in model.decoder.parameters())


class Modes(Callback):
    """Which parts are in training mode at every micro-batch."""

    def __init__(self):
        self.seen = set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.add(tuple(name for name, part in pl_module.parts.items() if any(m.training for m in part.modules())))


def test_frozen_parts_stay_in_evaluation_mode_and_keep_their_weights():
    model, modes = tiny_model(DECODER_FROZEN), Modes()
    data = Prepared([tiny_batch()] * 4, {"held out": [tiny_batch()]})
    tiny_trainer(callbacks=[modes], limit_val_batches=1.0, val_check_interval=2).fit(model, datamodule=data)
    assert modes.seen == {("projector",)}
    start = built_model(DECODER_FROZEN)
    for name, part in model.parts.items():
        same = [torch.equal(ours, before) for ours, before in zip(part.parameters(), start.parts[name].parameters(), strict=True)]
        assert all(same) if name != "projector" else not any(same)


class Meddler(MLP):
    """A projector with a will of its own."""

    def __init__(self, requires_grad):
        super().__init__()
        self.wanted = requires_grad

    def requires_grad_(self, requires_grad=True):
        super().requires_grad_(requires_grad)
        self.layers[0].weight.requires_grad_(self.wanted)
        return self


@pytest.mark.parametrize(
    ("unfreezes", "rates", "message"),
    [
        (True, LearningRates(decoder=1e-3), "projector.layers.0.weight should be frozen by model.learning_rates.projector = None"),
        (False, ALL, "projector.layers.0.weight should be trained by model.learning_rates.projector = 0.002"),
    ],
)
def test_a_part_that_decides_for_itself_is_found(unfreezes, rates, message):
    model = tiny_model(rates, projector=Meddler(unfreezes))
    with pytest.raises(RecipeError, match=message):
        tiny_trainer().fit(model, datamodule=Prepared([tiny_batch()]))


def test_parameter_groups():
    model = built_model(ALL, weight_decay=0.1, betas=(0.8, 0.95), projector=Resampler(num_queries=4, depth=1, num_heads=2))
    optimizer = model.configure_optimizers()
    assert optimizer.defaults["betas"] == (0.8, 0.95)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = []
    for group in optimizer.param_groups:
        part = group["name"].removesuffix("_no_decay")
        assert group["lr"] == getattr(ALL, part)
        assert group["betas"] == (0.8, 0.95)
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            assert name.startswith(part)
            is_vector = name.endswith("bias") or "norm" in name or ".ln_" in name or name.endswith("class_embedding")
            assert group["weight_decay"] == (0.0 if is_vector else 0.1), name
            assert group["name"].endswith("_no_decay") == is_vector
    assert sorted(seen) == sorted(names.values())


def test_parameter_groups_of_frozen_parts_do_not_exist():
    groups = built_model(DECODER_FROZEN).configure_optimizers().param_groups
    assert [group["name"] for group in groups] == ["projector", "projector_no_decay"]


@pytest.mark.parametrize("rates", [LearningRates(), LearningRates(decoder=0.0), LearningRates(decoder=1e-3, projector=-1.0)])
def test_learning_rates_that_train_nothing(rates):
    with pytest.raises(RecipeError, match="null freezes a part"):
        tiny_model(rates)


def test_sample_format_needs_no_layers():
    layout = tiny_model().sample_format()
    assert layout.tokens_per_image == TOKENS_PER_IMAGE
    assert layout.image_size == TOWER["image_size"]
    assert layout.image_token_id == IMAGE_TOKEN_ID
    assert tiny_model(projector=Resampler(num_queries=3, depth=1, num_heads=2)).sample_format().tokens_per_image == 3


def test_configure_model_builds_once():
    model = built_model()
    before = model.decoder.lm
    model.configure_model()
    assert model.decoder.lm is before


# --- steps


class Sum(Metric):
    """Times that it was called, as a metric of torchmetrics."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self):
        self.total += 1

    def compute(self):
        return self.total


class Logs(Callback):
    """One of every kind of value, with an option by its place, as Lightning's own `log` takes them."""

    def setup(self, trainer, pl_module, stage):
        pl_module.metric = Sum()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.metric()
        for name, value in (("int", 3), ("float", 0.5), ("tensor", torch.tensor(2.0)), ("metric", pl_module.metric)):
            pl_module.log(name, value, True)


def test_log_takes_what_lightning_takes():
    trainer = tiny_trainer(callbacks=[Logs()])
    trainer.fit(tiny_model(), datamodule=Prepared([tiny_batch(), tiny_batch(1)]))
    expected = {"int": 3.0, "float": 0.5, "tensor": 2.0, "metric": 1.0}
    assert {name: float(trainer.progress_bar_metrics[name]) for name in expected} == expected


class Snapshots(Callback):
    """Weights, optimizer state and logged values after every optimizer step."""

    def __init__(self):
        self.weights, self.state, self.logged = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(weights(pl_module))
        state = trainer.optimizers[0].state
        self.state.append({f"{i}.{k}": v.clone() for i, values in enumerate(state.values()) for k, v in values.items()})
        self.logged.append(trainer.global_step)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_step_without_targets_leaves_weights_and_optimizer_state(clip):
    nothing = pack([tiny_document(6, (2,), targets=0), tiny_document(3, targets=0)])
    snapshots = Snapshots()
    trainer = tiny_trainer(callbacks=[snapshots], gradient_clip_val=clip)
    trainer.fit(tiny_model(weight_decay=0.1), datamodule=Prepared([tiny_batch(), nothing, tiny_batch(1)]))
    first, second, third = snapshots.weights
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(second[name], third[name]) for name in first)
    first, second, third = snapshots.state
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert snapshots.logged == [1, 2, 3]  # the schedule and the data advance

    without = Snapshots()
    data = Prepared([tiny_batch(), tiny_batch(1)])
    tiny_trainer(callbacks=[without], gradient_clip_val=clip).fit(tiny_model(weight_decay=0.1), datamodule=data)
    assert_equal(snapshots.weights[-1], without.weights[-1])


def test_training_without_targets_from_the_first_step():
    nothing = pack([tiny_document(3, targets=0)])
    record = Record()
    tiny_trainer(callbacks=[record]).fit(tiny_model(), datamodule=Prepared([nothing, tiny_batch()]))
    assert "train/loss" not in record.steps[0]
    assert record.steps[1]["train/loss"] > 0


def test_validation_loss_is_weighted_by_tokens_for_each_source():
    model = built_model().eval()
    sources = {"one": [tiny_batch(1), pack([tiny_document(3, (1,))])], "other": [tiny_batch(2)]}
    trainer = tiny_trainer(limit_val_batches=1.0)
    trainer.validate(model, datamodule=Prepared([], sources), verbose=False)
    for name, batches in sources.items():
        with torch.no_grad():
            total = sum(model.loss_sum(batch) for batch in batches).item()
        expected = total / sum(len(batch.targets) for batch in batches)
        assert trainer.callback_metrics[f"val/loss/{name}"].item() == pytest.approx(expected, rel=1e-6)


# --- generation


def generating_model():
    model = built_model().eval()
    model.tokenizer = Numbers()
    return model


def test_generation_of_a_mixed_batch_equals_one_prompt_at_a_time():
    model = generating_model()
    prompts = tiny_documents()
    together = model.generate(prompts, max_new_tokens=12, end_token_id=2)
    assert together == [model.generate([prompt], max_new_tokens=12, end_token_id=2)[0] for prompt in prompts]
    assert len(set(together)) == len(prompts)
    assert all(len(answer.split()) == 12 for answer in together)


def test_generation_follows_the_training_forward():
    """Greedy tokens are the most likely ones of the packed forward pass, token by token; labels do not matter."""
    model = generating_model()
    prompt = tiny_document(9, (0, 4), targets=0)
    embeds, best = model.fuse(pack([prompt])).detach(), []
    for _ in range(5):
        length = len(embeds)
        hidden = model.decoder(embeds, torch.arange(length), torch.tensor([0, length], dtype=torch.int32), length)
        best.append(model.decoder.head(hidden[-1:]).argmax(1))
        embeds = torch.cat([embeds, model.decoder.embed(best[-1]).detach()])
    assert model.generate([prompt], max_new_tokens=5, end_token_id=2) == [" ".join(str(one.item()) for one in best)]


def test_generation_ends_at_the_end_token():
    prompts = tiny_documents()
    answers = [answer.split() for answer in generating_model().generate(prompts, max_new_tokens=12, end_token_id=2)]
    end = answers[0][5]
    shorter = generating_model().generate(prompts, max_new_tokens=12, end_token_id=int(end))
    assert shorter == [" ".join(answer[: answer.index(end)] if end in answer else answer) for answer in answers]
    assert len(shorter[0].split()) <= 5


def test_text_is_the_tokenizers():
    model = built_model().eval()
    ids = torch.tensor([[model.tokenizer.convert_tokens_to_ids(f"<0x{ord(letter):02X}>") for letter in "yes"] + [2, 2]])
    model.decoder.generate = lambda *arguments: ids
    assert model.generate([tiny_document(3)], end_token_id=2) == ["yes"]


def test_training_continues_after_generation():
    model = built_model()
    before = model.loss_sum(tiny_batch())
    model.generate(tiny_documents(), max_new_tokens=3, end_token_id=2)
    assert model.loss_sum(tiny_batch()) == before
    assert model.training
