"""`python main.py export`: its options, read before anything heavy is imported."""

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from components.errors import RecipeError
from components.run_folder import UNFINISHED, find_checkpoint


def export(
    ckpt: str,
    output: str,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    image: list[str] | None = None,
) -> None:
    """Write a trained model as a Hugging Face LLaVA folder and prove that transformers computes the same with it.

    Args:
        ckpt: A run folder (its newest complete checkpoint is written) or a checkpoint folder.
        output: The new folder.
        dtype: Number format of the weights: float32, bfloat16 or float16. By default that of an imported model, else the one
            that the run computed in.
        image: Picture files for the proof; by default pictures drawn by the program.

    Raises:
        RecipeError: The folder exists, the model has no place in the layout, or the written folder does not compute the same.
    """
    final = Path(output).resolve()
    for folder in (final, final.with_name(final.name + UNFINISHED)):
        if folder.exists():
            raise RecipeError(f"--output: {folder} exists. Choose another name, or delete it.")
    if missing := [name for name in image or [] if not Path(name).is_file()]:
        raise RecipeError(f"--image: {', '.join(missing)} does not exist.")
    checkpoint = find_checkpoint(ckpt, "--ckpt")
    from components.huggingface import exporting  # heavy: only when there is something to export

    exporting.export(checkpoint, final, dtype, [Path(name) for name in image or []])


def main(arguments: list[str]) -> int:
    """Parse the options of `export` and run it."""
    parser = ArgumentParser(
        prog="python main.py export", description="Write a trained model as a Hugging Face LLaVA folder.", exit_on_error=False
    )
    parser.add_function_arguments(export, skip={"image"})
    parser.add_argument("--image", nargs="*", default=[], help="Picture files for the proof; by default drawn by the program.")
    export(**parser.parse_args(arguments).as_dict())
    return 0
