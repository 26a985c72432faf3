"""VisionLanguageModel: assembles tower, projector and decoder; loss, freezing, optimizer and generation.

Source: visual instruction tuning, arXiv 2304.08485 and 2310.03744. Differs: batches are packed, and the loss is normalised by the
supervised tokens of the whole optimizer step, over all ranks and micro-batches.
"""

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from components.batch import Batch, Document, SampleFormat, pack
from components.causality import prove_causal
from components.checkpoint_files import load_start
from components.decoder import Decoder
from components.errors import RecipeError
from components.learning_rates import LearningRates
from components.loss import cross_entropy_sum
from components.optimizer_step import OptimizerStep, Wishes, divide_gradients, of_all_ranks
from components.projector import Projector
from components.prompts import left_padded
from components.random_streams import random_stream, seed_at
from components.sharding import agreed, give_memory, gradient_norm, layout_of, shard, whole_shape
from components.tokenizer import load_tokenizer
from components.vision_tower import VisionTower


class VisionLanguageModel(LightningModule):
    """Pictures and text in, text out: a vision tower, a projector and a decoder trained with AdamW.

    Args:
        vision_tower: Pictures to patch features.
        projector: Patch features to visual tokens.
        decoder: Token embeddings to text.
        learning_rates: Peak learning rate of each part; null freezes the part.
        weight_decay: AdamW weight decay, >= 0; norms, biases and other vectors are never decayed.
        betas: AdamW decay rates of the first and second moment, each in [0, 1).
        initial_weights: Weights that replace the parts' own: run folder or checkpoint of an earlier stage, or folder or hub id of a
            LLaVA-1.5 model in Hugging Face's layout (llava-hf/llava-1.5-7b-hf) or in the original one (liuhaotian/llava-v1.5-7b).

    Raises:
        RecipeError: Every part is frozen, a learning rate is not positive, a frozen decoder has adapters, or `initial_weights` do
            not fit.
    """

    def __init__(
        self,
        vision_tower: VisionTower,
        projector: Projector,
        decoder: Decoder,
        learning_rates: LearningRates,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        initial_weights: str | None = None,
    ) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        self.projector = projector
        self.decoder = decoder
        self.learning_rates = learning_rates
        self.weight_decay = weight_decay
        self.betas = betas
        self.initial_weights = initial_weights
        self.built = False
        self.step_totals: Float[Tensor, " two"] | None = None
        self.wishes = Wishes()
        self.step: OptimizerStep | None = None
        rates = asdict(learning_rates)
        if not any(rates.values()) or any(rate is not None and rate <= 0 for rate in rates.values()):
            raise RecipeError(
                f"model.learning_rates is {rates}: give at least one part a learning rate above 0; null freezes a part."
            )
        if decoder.lora is not None and learning_rates.decoder is None:
            raise RecipeError(
                "model.decoder.init_args.lora has no effect, since model.learning_rates.decoder is null. Give the decoder a "
                "learning rate, which is then that of its adapters, or make lora null."
            )

    @property
    def parts(self) -> dict[str, VisionTower | Projector | Decoder]:
        """The three parts by their names in the recipe."""
        return {"vision_tower": self.vision_tower, "projector": self.projector, "decoder": self.decoder}

    def sample_format(self) -> SampleFormat:
        """What the data must know of this model. Needs no weights."""
        return SampleFormat(
            tokenizer=self.decoder.tokenizer,
            tokens_per_image=self.projector.num_tokens(self.vision_tower.num_patches),
            image_size=self.vision_tower.image_size,
            image_mean=self.vision_tower.mean,
        )

    @cached_property
    def tokenizer(self):  # noqa: ANN201
        """The decoder's tokenizer, for generation."""
        return load_tokenizer(self.decoder.tokenizer)

    # --- construction

    def build(self, on_meta: Collection[str] = ()) -> None:
        """The layers of all parts, without weights from anywhere; may run on the meta device.

        Args:
            on_meta: Names of parts that get no memory, whatever the device. What the others draw does not depend on it.
        """
        for name, part in self.parts.items():
            with random_stream(name), torch.device("meta") if name in on_meta else nullcontext():
                if isinstance(part, Projector):
                    part.connect(feature_dim=self.vision_tower.feature_dim, embed_dim=self.decoder.embed_dim)
                else:
                    part.build()
        self.set_trainable()

    def adapt(self) -> None:
        """Insert the decoder's adapters, if any: after `build`, before weights are read."""
        with random_stream("adapters"):
            self.decoder.adapt()
        self.set_trainable()

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the recipe trains: the parts with a learning rate, and of a decoder with adapters these alone."""
        trained: list[nn.Parameter] = []
        for name, part in self.parts.items():
            if getattr(self.learning_rates, name) is not None:
                trained += part.trainable_parameters() if isinstance(part, Decoder) else part.parameters()
        return trained

    def set_trainable(self) -> None:
        """A part without a learning rate needs no gradient, nor does what adapters are put beside."""
        for name, part in self.parts.items():
            part.requires_grad_(getattr(self.learning_rates, name) is not None)

    def demand_vocabulary(self) -> None:
        """Every token of the tokenizer has a row in the decoder's tables.

        Raises:
            RecipeError: It has not.
        """
        if len(self.tokenizer) > self.decoder.vocab_size:
            raise RecipeError(
                f"The tokenizer has {len(self.tokenizer)} tokens, but the decoder's vocab_size is {self.decoder.vocab_size} "
                "(key model.decoder.init_args.config.vocab_size). Raise it, or name the tokenizer of these weights."
            )

    def configure_model(self) -> None:
        """Build, shard, and only then read weights: no rank ever holds more than its part of them. Called by the Trainer.

        A run that continues from `trainer.ckpt_path` reads none, since Lightning fills the model from it afterwards.
        """
        if self.built:
            return
        self.demand_vocabulary()
        continues = self._trainer is not None and self.trainer.ckpt_path is not None
        all_come = continues or self.initial_weights is not None
        self.build(on_meta={name for name, part in self.parts.items() if all_come or part.has_weights})
        self.adapt()
        device = torch.device("cpu")
        if self.device_mesh is not None:
            blocks = [block for part in self.parts.values() for block in part.blocks()]
            shard(self, blocks, self.device_mesh, layout_of(self))
            device = self.trainer.strategy.root_device
        give_memory(self, device)
        self.decoder.reset_buffers()
        if not continues:
            with agreed(self.trainer.world_size if self._trainer is not None else 1) as facts:
                facts.append(load_start(self))
        self.built = True

    def on_fit_start(self) -> None:
        """Check that what trains is what the recipe declares."""
        optimized = {id(p) for optimizer in self.trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        trained = {id(parameter) for parameter in self.trained_parameters()}
        for name, part in self.parts.items():
            for parameter_name, parameter in part.named_parameters():
                declared = id(parameter) in trained
                adapters = " and its lora" if name == "decoder" and self.decoder.lora else ""
                if declared != parameter.requires_grad or declared != (id(parameter) in optimized):
                    raise RecipeError(
                        f"{name}.{parameter_name} should be {'trained' if declared else 'frozen'} by "
                        f"model.learning_rates.{name} = {getattr(self.learning_rates, name)}{adapters}, but it "
                        f"{'requires' if parameter.requires_grad else 'does not require'} a gradient and is "
                        f"{'' if id(parameter) in optimized else 'not '}given to the optimizer. Does the part change requires_grad?"
                    )

    def on_train_start(self) -> None:
        """Check that no position sees a later one; only now has a run that continues its weights."""
        self.set_modes()
        with self.trainer.precision_plugin.forward_context():
            prove_causal(self)

    def set_modes(self) -> None:
        """Trained parts in training mode, frozen parts in evaluation mode."""
        for name, part in self.parts.items():
            part.train(getattr(self.learning_rates, name) is not None)

    def log(self, name: str, value: Any, *options: Any, **named: Any) -> None:
        """Log a number at the step. If the host made it, the device writes it anew: to copy it there would wait for the device."""
        by_host = isinstance(value, int | float)
        super().log(name, torch.full((), float(value), device=self.device) if by_host else value, *options, **named)

    # --- the step

    def fuse(self, batch: Batch) -> Float[Tensor, "tokens embed_dim"]:
        """Token embeddings of the row, with the visual tokens in their slots."""
        embeds = self.decoder.embed(batch.input_ids.clamp(min=0))
        pixels = batch.pixels
        if no_images := len(pixels) == 0:  # a rank without pictures still takes part in every collective
            size = self.vision_tower.image_size
            pixels = torch.zeros((1, 3, size, size), dtype=torch.uint8, device=embeds.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.learning_rates.vision_tower is not None):
            features = self.vision_tower(pixels)
        visual = self.projector(features).flatten(0, 1).to(embeds.dtype)
        if no_images:
            return embeds + 0.0 * visual.sum()
        return embeds.index_copy(0, batch.image_positions, visual)

    def forward(self, batch: Batch, loss: bool = False) -> Float[Tensor, "targets vocab"] | Float[Tensor, ""]:
        """Packed batch in, logits of the supervised positions out; or the sum of their loss, perhaps without all logits at once."""
        embeds = self.fuse(batch)
        hidden = self.decoder(embeds, batch.position_ids, batch.cumulative_lengths, batch.max_length)[batch.target_positions]
        if loss:
            return cross_entropy_sum(self.decoder.head, hidden, batch.targets, self.decoder.vocab_size)
        return self.decoder.head(hidden)

    def loss_sum(self, batch: Batch) -> Float[Tensor, ""]:
        """Sum of the cross-entropy over the supervised tokens of the batch."""
        return self(batch, loss=True)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Address randomness by position, as the data are: a run that continues draws what an uninterrupted one would."""
        torch.manual_seed(seed_at(batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""]:
        """Sum of the loss, scaled to cancel the averages that Lightning and the strategy take."""
        loss = self.loss_sum(batch)
        totals = torch.stack([loss.detach(), torch.full_like(loss, len(batch.targets))])
        self.step_totals = totals if self.step_totals is None else self.step_totals + totals
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def on_after_backward(self) -> None:
        """After the last micro-batch of an optimizer step: divide the gradients by the supervised tokens of all ranks."""
        if (self.trainer.fit_loop.batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        assert self.step_totals is not None
        self.all_totals = of_all_ranks(self.step_totals, self.wishes, self.trainer.world_size)
        self.step_totals = None
        divide_gradients(self.parameters(), self.all_totals[1].clamp(min=1))

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the norm of all gradients. A step without targets, or not finite on any rank, changes no weights."""
        norm = gradient_norm(self.parameters())
        # the one moment of a step at which the host waits for the device
        self.step = OptimizerStep(*torch.cat([self.all_totals, norm.reshape(1)]).tolist())
        if self.step.skipped:
            self.zero_grad(set_to_none=True)
            return
        self.log("train/loss", self.all_totals[0] / self.all_totals[1])
        self.log("norm/gradient", norm)
        if gradient_clip_val:
            nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, norm)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add up the loss and the supervised tokens of the data module's source of this loader."""
        if not self.validation_names:
            return
        loss = self.loss_sum(batch)
        self.validation_totals[dataloader_idx] += torch.stack([loss, torch.full_like(loss, len(batch.targets))])

    def on_validation_epoch_start(self) -> None:
        """Forget the sums of the last validation."""
        self.validation_names: list[str] = self.trainer.datamodule.validation_names  # type: ignore[attr-defined]
        self.validation_totals = torch.zeros(len(self.validation_names), 2, device=self.device)

    def on_validation_epoch_end(self) -> None:
        """Log the token-weighted loss of each source, over all ranks."""
        totals = self.trainer.strategy.reduce(self.validation_totals, reduce_op="sum")
        for name, (loss, count) in zip(self.validation_names, totals, strict=True):
            if count > 0:
                # summed over ranks already: sync_dist reduces nothing here, it only keeps Lightning from recommending it
                self.log(f"val/loss/{name}", loss / count, rank_zero_only=True, sync_dist=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Nothing: the benchmarks of the test command ask for themselves."""

    def predict_step(self, batch: Batch, batch_idx: int) -> list[str]:
        """Nothing: the questions of the predict command are asked by its callback."""
        return []

    def configure_optimizers(self) -> Optimizer:
        """AdamW with one group per trained part for matrices and one, without decay, for norms, biases and other vectors."""
        groups = []
        for name, part in self.parts.items():
            rate = getattr(self.learning_rates, name)
            trained = [p for p in part.parameters() if p.requires_grad]
            for suffix, decay, members in (
                ("", self.weight_decay, [p for p in trained if len(whole_shape(p)) > 1]),
                ("_no_decay", 0.0, [p for p in trained if len(whole_shape(p)) <= 1]),
            ):
                if members:
                    groups.append({"params": members, "lr": rate, "weight_decay": decay, "name": name + suffix})
        return AdamW(groups, betas=self.betas, fused=True)

    # --- generation

    def generate(
        self,
        prompts: list[Document],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        *,
        end_token_id: int,
    ) -> list[str]:
        """Prompts in, answers out. The arguments are those of `generate_ids`."""
        answers = self.generate_ids(prompts, max_new_tokens, temperature, top_p, end_token_id=end_token_id)
        spoken = [ids[:-1] if ids and ids[-1] == end_token_id else ids for ids in answers]
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in spoken]

    @torch.no_grad()
    def generate_ids(
        self,
        prompts: list[Document],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        *,
        end_token_id: int,
    ) -> list[list[int]]:
        """Prompts in, the token ids of their answers out, up to and with the end token.

        Args:
            prompts: Tokenized prompts with their pictures; labels are ignored.
            max_new_tokens: Longest answer, in tokens.
            temperature: 0 for greedy decoding, above 0 for sampling.
            top_p: Share of the probability mass that is sampled from, in (0, 1].
            end_token_id: Id that ends an answer: that of the conversation template (`Preparation.end_token_id`).
        """
        embeds, mask, beginnings = left_padded(prompts, lambda documents: self.fuse(pack(documents).to(self.device)))
        new = self.decoder.generate(embeds, mask, max_new_tokens, end_token_id, temperature, top_p, beginnings).tolist()
        return [row[: row.index(end_token_id) + 1] if end_token_id in row else row for row in new]
