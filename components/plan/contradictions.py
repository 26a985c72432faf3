"""Contradictions: what training would refuse, or could not do as the recipe says, told before any rank is up."""

from components.plan.facts import Facts
from components.sharding.layout import refusal


def warmup(facts: Facts) -> str | None:
    """The warmup is as long as the run."""
    steps, run = facts.warmup_steps, facts.workload.max_steps
    if steps < run:
        return None
    return (
        f"warmup takes {steps:,} steps, but max_steps is {run:,}: the peak is never reached. Lower warmup.steps, or give fraction."
    )


def global_batch(facts: Facts) -> str | None:
    """The global batch cannot be dealt."""
    if facts.divides:
        return None
    ranks, accumulation = facts.running.ranks, facts.running.accumulation
    return (
        f"data.global_batch_size = {facts.workload.global_batch_size:,} is not a multiple of {ranks} ranks x {accumulation} "
        f"accumulated micro-batches = {ranks * accumulation:,}. Change one of the three."
    )


def ranks(facts: Facts) -> str | None:
    """The strategy lays the model over another number of ranks."""
    running, layout = facts.running, facts.running.layout
    if layout is None or layout.ranks == running.ranks:
        return None
    return (
        f"trainer.strategy lays {layout.replicas} replicas x {layout.shards} shards = {layout.ranks} ranks, but the trainer has "
        f"{running.nodes} nodes x {running.devices} devices = {running.ranks}. Make the two products equal."
    )


def strategy_options(facts: Facts) -> str | None:
    """The strategy is told something without effect, or beside another precision."""
    key, layout = "trainer.strategy.init_args", facts.running.layout
    if layout is None:
        return None
    if facts.running.precision != "32-true":
        return (
            f"trainer.precision is {facts.running.precision}, but trainer.strategy keeps float32 shards and computes in its "
            "param_dtype. Make trainer.precision 32-true."
        )
    if (reason := refusal(layout, facts.running.accumulation)) is not None:
        return reason
    if layout.replicate_frozen and not any(rate is None for rate in facts.rates.values()):
        return f"{key}.replicate_frozen has no effect, since every part has a learning rate. Make it false, or freeze a part."
    return None


def nothing_trains(facts: Facts) -> str | None:
    """A part has a learning rate and nothing that learns."""
    for name, part in facts.workload.parts.items():
        if facts.rates[name] is not None and not part.trained_parameters:
            return (
                f"model.learning_rates.{name} is {facts.rates[name]:g}, but the part keeps all its parameters frozen. Make it "
                "null, or let the part train."
            )
    return None


def resolution(facts: Facts) -> str | None:
    """The first stage saw pictures of another size."""
    first, work = facts.first_stage, facts.workload
    if first is None or (first.image_size, first.tokens_per_image) == (work.image_size, work.tokens_per_image):
        return None
    return (
        f"pictures are {work.image_size} px, {work.tokens_per_image} visual tokens, but model.initial_weights = {first.name} was "
        f"trained at {first.image_size} px, {first.tokens_per_image} visual tokens. Name the tower and projector of that run, or a "
        "first stage with these."
    )


def monitor(facts: Facts) -> str | None:
    """The best checkpoint is chosen by a score that never comes."""
    key, asking = facts.saving.monitor, facts.asking
    if key is None:
        return None
    if not asking.at_end and asking.every_n_steps is None:
        return f"checkpoint.monitor = {key} has no effect: validation is due neither on the way nor at_end. Give every_n_steps."
    benchmark = key.partition("/")[0].removesuffix("_partial")
    if benchmark in asking.benchmarks:
        return None
    names = ", ".join(asking.benchmarks) or "none"
    return f"checkpoint.monitor = {key} is no score of this validation, whose benchmarks are: {names}. Name a score of one of them."


def visual_tokens(facts: Facts) -> str | None:
    """No picture fits into a document."""
    tokens = facts.workload.tokens_per_image
    if tokens < facts.max_length:
        return None
    return (
        f"one picture is {tokens} visual tokens, but data.max_length is {facts.max_length}: every sample with a picture is "
        "refused. Raise max_length, or take a projector with fewer tokens, such as projector/pixel_shuffle.yaml."
    )


def static_memory(facts: Facts) -> str | None:
    """Weights, gradients and optimizer alone are more than a GPU has."""
    if facts.estimate is None:
        return None
    memory = facts.estimate.memory
    static = memory.parameters + memory.gradients + memory.optimizer + memory.frozen
    if static <= memory.usable:
        return None
    return (
        f"weights, gradients and optimizer alone need {static:.0f} GiB of each GPU, which has {memory.usable:.0f}. "
        f"{facts.instead('Shard over more GPUs, train fewer parts, or train adapters (decoder/vicuna_7b_lora.yaml).')}"
    )


CONTRADICTIONS = (
    warmup,
    global_batch,
    ranks,
    strategy_options,
    nothing_trains,
    resolution,
    monitor,
    visual_tokens,
    static_memory,
)
"""All of them."""
