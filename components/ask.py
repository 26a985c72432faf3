"""`python main.py ask`: a question about a picture to a trained model, answered on the console."""

from pathlib import Path

from jsonargparse import ArgumentParser

from components.errors import BadSample, RecipeError
from components.run_folder import find_checkpoint
from components.turns import Turn


def ask(
    ckpt: str,
    question: str,
    image: list[str] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> str:
    """Ask a trained model a question.

    Args:
        ckpt: A run folder (its newest complete checkpoint answers) or a checkpoint folder.
        question: The question. Pictures come before it, unless it says `<image>` where they belong.
        image: Picture files, in the order of their places; none for a question without a picture.
        max_new_tokens: Longest answer in tokens, >= 1.
        temperature: 0 for the most likely answer, above 0 to sample.
        top_p: Share of the probability mass that is sampled from, in (0, 1].

    Raises:
        RecipeError: A value out of range, a picture or checkpoint that is not there or cannot be read.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise RecipeError(
            f"--max_new_tokens {max_new_tokens} must be at least 1, --temperature {temperature} at least 0 and "
            f"--top_p {top_p} in (0, 1]."
        )
    files = [Path(name) for name in image or []]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise RecipeError(f"--image: {', '.join(missing)} does not exist.")
    checkpoint = find_checkpoint(ckpt, "--ckpt")
    # heavy: only when there is something to ask
    from components.data import Sample
    from components.rebuild import load

    model, preparation = load(checkpoint)
    text = question if "<image>" in question else "<image>\n" * len(files) + question
    sample = Sample("question", [Turn("user", text)], [file.read_bytes() for file in files])
    try:
        prompt = preparation.prompt(sample, model.tokenizer, model.sample_format())
    except BadSample as error:
        raise RecipeError(f"--image {' '.join(map(str, files))}: {error}") from error
    end_token_id = preparation.end_token_id(model.tokenizer)
    return model.generate([prompt], max_new_tokens, temperature, top_p, end_token_id=end_token_id)[0]


def main(arguments: list[str]) -> int:
    """Parse the options of `ask` and print the answer."""
    parser = ArgumentParser(prog="python main.py ask", description="Ask a trained model about a picture.", exit_on_error=False)
    parser.add_function_arguments(ask, skip={"image"})
    parser.add_argument("--image", nargs="*", default=[], help="Picture files, in the order of their places.")
    print(ask(**parser.parse_args(arguments).as_dict()))
    return 0
