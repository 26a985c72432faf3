"""How much of each source a run draws: weights, epochs and numbers of samples become the weights of the mixture's segments."""

from collections.abc import Mapping

from components.data.order import BLOCK, Segment
from components.data.sources import Source
from components.errors import RecipeError


def segments_of(
    sources: Mapping[str, Source],
    sizes: Mapping[str, int],
    weight_changes: Mapping[int, Mapping[str, float]],
    max_steps: int,
    global_batch_size: int,
) -> list[Segment]:
    """Sources and changes of their weights in, the segments of the mixture out.

    Epochs and numbers of samples take their share of the whole run, to a thousandth of it; weights share the rest.

    Args:
        sources: The sources by name.
        sizes: Samples of each to train on.
        weight_changes: Weights from an optimizer step on.
        max_steps: Optimizer steps of the run, needed where a source states epochs or samples.
        global_batch_size: Samples in an optimizer step.

    Raises:
        RecipeError: More is asked for than the run draws, or a change names a step or a source that cannot be changed.
    """
    amounts = {name: _amount(source, sizes[name]) for name, source in sources.items() if source.weight is None}
    weights = {name: source.weight for name, source in sources.items() if source.weight is not None}
    total = max_steps * global_batch_size
    if amounts:
        _check_amounts(amounts, bool(weights), max_steps, global_batch_size)
    segments = [Segment(0, _shares(sources, amounts, weights, total))]
    for step, changed in sorted(weight_changes.items()):
        if step < 1 or (0 < max_steps <= step):
            raise RecipeError(
                f"data.weight_changes: step {step} must be at least 1, since sources state the weights of the beginning, and below "
                f"max_steps = {max_steps:,}."
            )
        if not changed:
            raise RecipeError(f"data.weight_changes: {step} names no source. Name one with its weight, or remove the step.")
        for name, weight in changed.items():
            if name not in sources:
                raise RecipeError(f"data.weight_changes: {step}: there is no source {name}. Sources: {', '.join(sources)}.")
            if name in amounts:
                raise RecipeError(f"data.weight_changes: {step}: {name} states epochs or samples. Give it a weight instead.")
            if weight < 0:
                raise RecipeError(f"data.weight_changes: {step}: {name} has weight {weight}; it must be at least 0.")
        weights = weights | dict(changed)
        segments.append(Segment(step * global_batch_size, _shares(sources, amounts, weights, total)))
    return segments


def _amount(source: Source, size: int) -> float:
    return source.epochs * size if source.epochs is not None else float(source.samples or 0)


def _check_amounts(amounts: Mapping[str, float], others: bool, max_steps: int, global_batch_size: int) -> None:
    if max_steps < 1:
        raise RecipeError("max_steps is not set. Every recipe states how many optimizer steps it trains.")
    asked, drawn = sum(amounts.values()), max_steps * global_batch_size
    steps = round(asked / global_batch_size)
    told = f"data.sources: {', '.join(amounts)} ask for {asked:,.0f} samples by their epochs and samples, {steps:,} steps;"
    for name, amount in amounts.items():
        drawable = round(amount / drawn * BLOCK) * drawn / BLOCK
        if abs(drawable - amount) > 0.02 * amount:
            raise RecipeError(
                f"data.sources.{name} asks for {amount:,.0f} samples by its epochs or samples. Shares are thousandths of the run, "
                f"here of {drawn:,} samples, so it would give {drawable:,.0f}. Ask for a multiple of {drawn / BLOCK:,.0f}, or "
                "give a weight."
            )
    if others and asked >= drawn:
        raise RecipeError(f"{told} max_steps = {max_steps:,} leaves nothing for the sources with weights. Raise max_steps.")
    if not others and abs(steps - max_steps) > 0.01 * max_steps:
        raise RecipeError(f"{told} max_steps is {max_steps:,}. Set it to {steps:,}, or give weights.")


def _shares(
    sources: Mapping[str, Source], amounts: Mapping[str, float], weights: Mapping[str, float], total: int
) -> tuple[float, ...]:
    if not amounts:
        return tuple(weights[name] for name in sources)
    rest, of_weights = total - sum(amounts.values()), sum(weights.values())
    if weights and not of_weights:
        raise RecipeError(f"data: all weights are 0 ({', '.join(weights)}). Give one of them a weight above 0.")
    return tuple(amounts[name] / total if name in amounts else weights[name] / of_weights * rest / total for name in sources)
