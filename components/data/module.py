"""InstructionData: weighted sources in, packed micro-batches out, in an order that depends on nothing but seed and position."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from components.batch import Batch, SampleFormat, pack
from components.data.micro_batches import FromStep, MicroBatches, TrainBatches, ValidationBatches
from components.data.order import BLOCK, Mixture, Shards
from components.data.preparation import Preparation, null_document
from components.data.quarantine import Quarantine
from components.data.rank_views import check_ranks_agree
from components.data.shares import segments_of
from components.data.sources import Source
from components.data.token_lengths import Measure, open_lengths
from components.errors import RecipeError
from components.image_modes import Decoding, SquareMode
from components.tokenizer import load_tokenizer

QUARANTINE = "quarantine.jsonl"
_ORDER_VERSION = 2
"""Of the rule by which a slot has its sample; a run continues by the rule that it began with, or not at all."""

say = rank_zero_only(print)


class InstructionData(LightningDataModule):
    """Conversations with pictures from weighted sources in, packed batches out.

    Args:
        sources: Name of each source and the source; the name stands in `val/loss/NAME` and in messages.
        template: Conversation template: plain, vicuna_v1, llama_2, llava_llama_2 or brief, or `chat_template` for the one that
            the tokenizer brings along (Qwen, LLaMA-3, Mistral and others).
        global_batch_size: Samples in an optimizer step, over all ranks and micro-batches; a multiple of ranks x accumulation.
        seed: Decides the order of the samples and the randomness inside them, >= 0.
        decoding: `llava` ignores EXIF rotation and drops alpha, `upright` rotates and composites on white.
        image_mode: `pad` to a square with the mean color, `crop` the center, or `squash` both sides.
        max_length: Most tokens of a document, >= 1; whole turns are dropped from its end to fit, counted in
            `train/truncated_samples`.
        max_bad_fraction: Share of the samples of each source that each rank may skip because they cannot be used, in [0, 1); of at
            least 1000 samples. They are listed in quarantine.jsonl, also across restarts; more of them end the run.
        fast_images: JPEGs are decoded and resized on a fast path, which rounds otherwise than LLaVA's does.
        weight_changes: Weights from an optimizer step on, `{STEP: {SOURCE: weight}}`; sources that it does not name keep theirs. A
            run that continues may have new ones after the step it has reached.
        num_workers: Worker processes that prepare batches, on each rank; 0 prepares them in the main process.

    Raises:
        RecipeError: Batch sizes that do not divide, a source that cannot be opened, too many bad samples.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        template: str,
        global_batch_size: int,
        seed: int = 0,
        decoding: Decoding = "upright",
        image_mode: SquareMode = "pad",
        max_length: int = 2048,
        max_bad_fraction: float = 0.0,
        fast_images: bool = False,
        weight_changes: dict[int, dict[str, float]] | None = None,
        num_workers: int = 2,
    ) -> None:
        super().__init__()
        if not sources or global_batch_size < 1 or max_length < 1 or seed < 0 or not 0 <= max_bad_fraction < 1 or num_workers < 0:
            raise RecipeError(
                f"data: {len(sources)} sources, global_batch_size = {global_batch_size} and max_length = {max_length} must be at "
                f"least 1, seed = {seed} and num_workers = {num_workers} at least 0, max_bad_fraction = {max_bad_fraction} "
                "in [0, 1)."
            )
        self.sources = sources
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.max_bad_fraction = max_bad_fraction
        self.weight_changes = weight_changes or {}
        self.num_workers = num_workers
        self.preparation = Preparation(template, decoding, image_mode, max_length, fast_images)

    @property
    def validation_names(self) -> list[str]:
        """Sources that have a validation loader, in the order of the loaders."""
        return [name for name, source in self.sources.items() if source.validation_fraction]

    def setup(self, stage: str) -> None:
        """Open the sources and learn the model's format."""
        if hasattr(self, "mixture"):
            return
        trainer = self.trainer
        model: Any = trainer.lightning_module
        self.layout = model.sample_format()
        self.tokenizer = load_tokenizer(self.layout.tokenizer)
        self.try_out(self.tokenizer, self.layout)
        if stage in ("test", "predict"):  # questions alone: the sources may be elsewhere
            return
        self.micro_batches = trainer.accumulate_grad_batches
        smallest = trainer.world_size * self.micro_batches
        if self.global_batch_size % smallest:
            raise RecipeError(
                f"data.global_batch_size = {self.global_batch_size} is not a multiple of {trainer.world_size} ranks x "
                f"{self.micro_batches} accumulated micro-batches = {smallest}. Change one of the three."
            )
        file = Path(trainer.log_dir or ".") / QUARANTINE  # log_dir talks to all ranks; a bad sample is one rank's
        self.quarantine = Quarantine(file, trainer.global_rank, trainer.world_size, self.max_bad_fraction)
        problem = None
        try:
            self._open()
        except RecipeError as error:
            problem = str(error)
        check_ranks_agree(problem, {} if problem else self._view())
        if stage == "fit":
            self._announce()

    def try_out(self, tokenizer: PreTrainedTokenizerBase, layout: SampleFormat) -> None:
        """A template that does not suit the tokenizer shows here, not in a worker at the first sample.

        Raises:
            RecipeError: Not even a question of one letter can be prepared.
        """
        self.preparation.try_out(tokenizer, layout)
        for name, source in self.sources.items():
            try:
                self.preparation.overridden(source.overrides).try_out(tokenizer, layout)
            except RecipeError as error:
                raise RecipeError(f"data.sources.{name}.overrides: {error}") from error

    def _open(self) -> None:
        for name, source in self.sources.items():
            try:
                source.setup()
            except RecipeError as error:
                raise RecipeError(f"data.sources.{name}: {error}") from error
            preparation = self.preparation.overridden(source.overrides)
            source.measured = open_lengths(Measure(source, preparation, self.tokenizer, self.layout))
        self.mixture = self.mix()
        self.order = self._order()

    def _view(self) -> dict[str, Any]:
        """What must be the same on all ranks, so that each of them deals the same samples to the same hands."""
        lengths = {name: "estimated" if source.measured is None else "measured" for name, source in self.sources.items()}
        return self.order | {"shares": self._shares()} | {f"lengths of data.sources.{name}": of for name, of in lengths.items()}

    def mix(self) -> Mixture:
        """The order of the samples; needs the sources set up.

        Raises:
            RecipeError: Shares of the sources that cannot be had.
        """
        shards = [Shards(source.shard_sizes, source.window) for source in self.sources.values()]
        sizes = {name: source.num_samples for name, source in self.sources.items()}
        segments = segments_of(self.sources, sizes, self.weight_changes, self.trainer.max_steps, self.global_batch_size)
        return Mixture(shards, segments, self.seed)

    def train_dataloader(self) -> DataLoader:
        """Packed micro-batches of the whole run, from the optimizer step that the trainer has reached."""
        steps = self.trainer.max_steps
        if steps < 1:
            raise RecipeError("max_steps is not set. Every recipe states how many optimizer steps it trains.")
        batches = self._batches(TrainBatches, mixture=self.mixture, global_batch_size=self.global_batch_size)
        return self._loader(batches, sampler=FromStep(self.trainer.global_step, steps, self.micro_batches))

    def val_dataloader(self) -> list[DataLoader]:
        """One loader for each source that holds samples out; for the validate command at least one."""
        if not self.validation_names and self.trainer.state.fn == TrainerFn.VALIDATING:
            return [self._without_samples()]
        size = self.global_batch_size // (self.trainer.world_size * self.micro_batches)
        return [
            self._loader(self._batches(ValidationBatches, [name], batch_size=size, seed=self.seed), shuffle=False)
            for name in self.validation_names
        ]

    def test_dataloader(self) -> DataLoader:
        """A batch without samples: the benchmarks ask their own questions."""
        return self._without_samples()

    def predict_dataloader(self) -> DataLoader:
        """A batch without samples: the questions come from a file of their own."""
        return self._without_samples()

    def _without_samples(self) -> DataLoader:
        batch = pack([null_document(self.layout, self.tokenizer, "no sample")], self.layout.image_token_id)
        return DataLoader([batch], batch_size=None, num_workers=0)  # type: ignore[arg-type]

    def on_before_batch_transfer(self, batch: Batch | RecipeError, dataloader_idx: int) -> Batch:
        """Write down the samples that could not be used, stop when they are too many."""
        if isinstance(batch, RecipeError):
            raise batch
        if batch.bad_samples:
            step = self.trainer.global_step
            drawn = dict(zip(self.sources, self.mixture.drawn(step * self.global_batch_size).tolist(), strict=True))
            for name, reason in batch.bad_samples:
                self.quarantine.add(name, reason, step, drawn[name])
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What decides the order, and the position in it."""
        return {"order": self.order, "mixture": self._shares(), "step": self.trainer.global_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to continue in another order.

        Raises:
            RecipeError: The data or the global batch differ from those of the checkpoint.
        """
        if self.trainer.state.fn != TrainerFn.FITTING:  # a validation continues from no position
            return
        step = state_dict.get("step", 0)
        saved = state_dict["order"] | _until(step, state_dict.get("mixture", []))
        now = self.order | _until(step, self._shares())
        changed = [f"{key}: {saved.get(key)} -> {now.get(key)}" for key in {**saved, **now} if saved.get(key) != now.get(key)]
        if changed:
            raise RecipeError(
                "The checkpoint was written with other data, so its position in it has no meaning here:\n  "
                + "\n  ".join(changed)
                + "\nRestore the data, or start a new run with --run NAME and model.initial_weights. "
                f"Weights may change from here on: data.weight_changes with a step of {step:,} or later."
            )

    def _order(self) -> dict[str, Any]:
        # the mixture knows the sources by their places
        order: dict[str, Any] = {
            "rule": _ORDER_VERSION, "seed": self.seed, "global_batch_size": self.global_batch_size, "sources": list(self.sources),
        }  # fmt: skip
        for name, source in self.sources.items():
            split = source.shard_sizes.tobytes() + source.validation_indices.tobytes()
            digest = hashlib.blake2b(split, digest_size=8).hexdigest()
            order[f"sources.{name}"] = f"{source.fingerprint()}, window {source.window}, {source.num_samples} samples {digest}"
        return order

    def _shares(self) -> list[list[Any]]:
        """Optimizer steps from which shares hold, with what each source then has of a block."""
        shares = []
        for segment in self.mixture.segments:
            quotas = zip(self.sources, self.mixture.quotas_at(segment.first_slot).tolist(), strict=True)
            told = ", ".join(f"{name} {quota}/{BLOCK}" for name, quota in quotas)
            shares.append([segment.first_slot // self.global_batch_size, told])
        return shares

    def _batches(self, kind: Callable[..., MicroBatches], names: list[str] | None = None, **fields: Any) -> MicroBatches:
        return kind(
            sources={name: self.sources[name] for name in names or self.sources},
            preparation=self.preparation,
            layout=self.layout,
            tokenizer=self.tokenizer,
            rank=self.trainer.global_rank,
            ranks=self.trainer.world_size,
            micro_batches=self.micro_batches,
            **fields,
        )

    def _loader(self, batches: MicroBatches, **options: Any) -> DataLoader:
        return DataLoader(
            batches,
            batch_size=None,  # an item is a whole packed batch
            num_workers=self.num_workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            prefetch_factor=4 if self.num_workers else None,
            **options,
        )

    def _announce(self) -> None:
        drawn = self.mixture.drawn(self.trainer.max_steps * self.global_batch_size)
        for (name, source), count in zip(self.sources.items(), drawn.tolist(), strict=True):
            say(
                f"data {name}: {source.num_samples:,} samples of {source.describe()}; {count / drawn.sum():.1%} of the mixture, "
                f"{count / source.num_samples:.2f} epochs in {self.trainer.max_steps:,} steps"
            )
        for step, shares in self._shares()[1:]:
            say(f"data from step {step:,} on: {shares}")


def _until(step: int, shares: list[list[Any]]) -> dict[str, str]:
    """The shares that have decided what was drawn before an optimizer step."""
    return {f"shares from step {first}": of for first, of in shares if first < max(step, 1)}
