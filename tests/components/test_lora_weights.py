"""What a run with adapters writes, what continues from it, and its weights merged into plain ones."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_lora import LORA, AdaptedModel, arguments, decoder, logits, lora_arguments
from tiny import TOWER_FROZEN, Prepared, assert_equal, built_model, tiny_batch, tiny_document, tiny_model, tiny_trainer, weights
from transformers import AutoModelForCausalLM

from callbacks.checkpoint import Checkpoint
from components.checkpoint_files import load_weights
from components.decoder import LoRA, Merged
from components.errors import RecipeError
from components.named_tensors import TorchFiles
from components.run_folder import RECIPE, checkpoint_folder

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four optimizer steps, with its weights at the end."""
    folder = tmp_path_factory.mktemp("runs") / "adapters"
    folder.mkdir()
    (folder / RECIPE).write_text(
        "model: {decoder: {init_args: {lora: {rank: 3, alpha: 12.0, dropout: 0.2, target_modules: all-linear}}}}\n"
    )
    model = AdaptedModel(**arguments(TOWER_FROZEN))
    trainer = tiny_trainer(callbacks=[Checkpoint(2)], enable_checkpointing=True, default_root_dir=folder)
    trainer.fit(model, datamodule=Prepared([tiny_batch(seed) for seed in range(4)]))
    return folder, weights(model)


def test_a_checkpoint_is_the_whole_model(run):
    """Base, adapters and projector, in the way that `ask` reads them."""
    folder, expected = run
    model = tiny_model(TOWER_FROZEN, **lora_arguments())
    model.build()
    model.adapt()
    load_weights(model, checkpoint_folder(folder, 4), "--ckpt")
    restored = weights(model)
    assert restored.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in restored.items())
    kinds = ("vision_tower.", "projector.", ".base_layer.weight", ".lora_A.default.weight", ".lora_B.default.weight", "lm_head")
    assert all(any(kind in name for name in expected) for kind in kinds)


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_a_continued_run_is_the_uninterrupted_one(run):
    folder, expected = run
    model = tiny_model(TOWER_FROZEN, **lora_arguments())
    state = checkpoint_folder(folder, 2) / "state"
    tiny_trainer().fit(model, datamodule=Prepared([tiny_batch(seed) for seed in range(4)]), ckpt_path=state)
    assert all(torch.equal(value, expected[name]) for name, value in weights(model).items())


@torch.no_grad()
def test_a_later_stage_starts_from_the_merged_weights(run):
    """Apart by no more than rounding is worth in this model: moving every weight by half a unit in its last place."""
    folder, expected = run
    earlier, rounded = (tiny_model(TOWER_FROZEN, **lora_arguments()) for _ in range(2))
    for model in (earlier, rounded):
        model.build()
        model.adapt()
        model.load_state_dict(expected)
        model.eval().double()
    generator = torch.Generator().manual_seed(0)
    for parameter in rounded.parameters():
        parameter.mul_(1 + (torch.rand(parameter.shape, generator=generator) - 0.5) * torch.finfo(torch.float32).eps)
    logits = earlier(tiny_batch())
    noise = (rounded(tiny_batch()) - logits).abs().max()
    assert noise < 1e-4 * logits.abs().max()
    for lora in (None, LORA):
        later = built_model(TOWER_FROZEN, initial_weights=str(folder), **lora_arguments(lora)).eval().double()
        assert (later(tiny_batch()) - logits).abs().max() <= 10 * noise
        assert torch.equal(weights(later)["projector.layers.0.weight"].float(), expected["projector.layers.0.weight"])


# --- merging


def stored(state, folder):
    torch.save({"state_dict": state}, folder / "state")
    return TorchFiles([folder / "state"], section="state_dict")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3"])
def test_merged_weights_are_those_of_peft(kind, tmp_path):
    adapted, plain = decoder(kind), decoder(kind, lora=None, adapted=False)
    merged = Merged(stored(adapted.state_dict(), tmp_path), LORA)
    assert merged.infos.keys() == plain.state_dict().keys()
    read = {name: merged.read(name) for name in merged.infos}
    for name, info in merged.infos.items():
        assert (tuple(read[name].shape), read[name].dtype) == (info.shape, info.dtype)
        rows = slice(3, 3 + info.shape[0] // 2)
        assert torch.equal(merged.read_rows(name, rows), read[name][rows])
    plain.load_state_dict(read)
    torch.testing.assert_close(logits(plain, tiny_document(9)), logits(adapted, tiny_document(9)), rtol=1e-5, atol=1e-5)

    base = AutoModelForCausalLM.from_config(copy.deepcopy(plain.lm.config))
    config = LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, lora_dropout=LORA.dropout, target_modules="all-linear")
    theirs = get_peft_model(base, config)
    theirs.load_state_dict({f"base_model.model.{name}": value for name, value in adapted.lm.state_dict().items()})
    assert_equal(read, {f"lm.{name}": value for name, value in theirs.merge_and_unload().state_dict().items()}, 1e-6)


def test_merged_weights_of_16_bits_are_added_up_in_32(tmp_path):
    adapted = {name: value.bfloat16() for name, value in decoder().state_dict().items()}
    merged = Merged(stored(adapted, tmp_path), LORA)
    name = "lm.model.layers.1.mlp.up_proj"
    base, down, up = (
        adapted[f"{name}.{end}"].double() for end in ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
    )
    expected = (base + 4 * up @ down).bfloat16()
    assert merged.read(f"{name}.weight").dtype == torch.bfloat16
    assert (merged.read(f"{name}.weight") != expected).float().mean() < 0.01  # a tie of the last bit now and then


@pytest.mark.parametrize(
    ("spoil", "lora", "message"),
    [
        ("lora_B", LORA, r"lm\.model\.layers\.0\.self_attn\.q_proj has weights of the shapes \(3, 32\) and None beside \(32, 32\)"),
        ("base_layer", LORA, r"layers\.0\.self_attn\.q_proj has weights of the shapes .* beside None"),
        ("nothing", LoRA(rank=4, alpha=4.0), r"is not an adapter of rank 4 \(key model\.decoder\.init_args\.lora\.rank"),
        ("", LORA, "holds no adapters, though its recipe states"),
    ],
)
def test_adapters_that_are_not_whole(spoil, lora, message, tmp_path):
    state = decoder(adapted=spoil != "").state_dict()
    state = {name: value for name, value in state.items() if not ("layers.0.self_attn.q_proj" in name and spoil and spoil in name)}
    with pytest.raises(RecipeError, match=message):
        Merged(stored(state, tmp_path), lora)
