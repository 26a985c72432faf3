"""HangMinutes: how long each phase of a run may go without progress."""

from dataclasses import asdict, dataclass

from components.errors import RecipeError


@dataclass(frozen=True)
class HangMinutes:
    """Minutes without progress after which a process counts as hanging, > 0; null: never.

    Args:
        start: From the model's construction to the end of the first micro-batch, and each other one of the first optimizer step.
        step: A micro-batch, unless ten times the median of the last optimizer steps is more.
        validation: A batch of a validation.
        checkpoint: The writing of a checkpoint.
        end: What comes after the last step, besides validation and checkpoint.
    """

    start: float | None = 30.0
    step: float | None = 5.0
    validation: float | None = 30.0
    checkpoint: float | None = 30.0
    end: float | None = 30.0

    def __post_init__(self) -> None:
        if wrong := {name: minutes for name, minutes in asdict(self).items() if minutes is not None and minutes <= 0}:
            raise RecipeError(f"guards.hang_minutes: {wrong} must be above 0, or null.")
