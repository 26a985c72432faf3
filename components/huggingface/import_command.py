"""`python main.py import`: its options, read before anything heavy is imported."""

from jsonargparse import ArgumentParser

from components.errors import RecipeError
from components.image_modes import Decoding, SquareMode
from components.run_folder import RUNS


def import_llava(
    weights: str,
    run: str,
    vision_tower: str | None = None,
    template: str | None = None,
    decoding: Decoding | None = None,
    image_mode: SquareMode | None = None,
) -> None:
    """Make a run of a released LLaVA model.

    Args:
        weights: Folder or hub id of a LLaVA-1.5 model, in Hugging Face's layout (llava-hf/llava-1.5-7b-hf) or in the original
            one (liuhaotian/llava-v1.5-7b).
        run: Name of the new run folder inside runs/.
        vision_tower: Folder or hub id of the CLIP tower where the model leaves it out, as the original releases do; by default
            the one that its config names.
        template: Conversation template that the model was trained with; by default what the model says, else `vicuna_v1`.
        decoding: `llava` or `upright`; by default what the model says, else `llava`.
        image_mode: `pad`, `crop` or `squash`; by default what the model says, else `pad`, which LLaVA-1.5 was trained with
            although the processors of the llava-hf releases crop.

    Raises:
        RecipeError: The run exists, or the model is not there, damaged, incomplete or of another kind.
    """
    folder = RUNS / run
    if folder.exists():
        raise RecipeError(f"--run: {folder} exists. Choose another name, or delete it.")
    from components.hub import fetch

    source = fetch(weights, "--weights")
    from components.huggingface import importing  # heavy: only when there is something to import

    importing.import_llava(weights, source, folder, vision_tower, template, decoding, image_mode)


def main(arguments: list[str]) -> int:
    """Parse the options of `import` and run it."""
    parser = ArgumentParser(prog="python main.py import", description="Make a run of a released LLaVA model.", exit_on_error=False)
    parser.add_function_arguments(import_llava)
    import_llava(**parser.parse_args(arguments).as_dict())
    return 0
