"""vlm-recipes: train, validate and ask vision-language models that are assembled from YAML recipes."""

import importlib
import os
import sys
from argparse import ArgumentError
from difflib import get_close_matches

from components.errors import RecipeError

COMMANDS = {
    "plan": "what a recipe will cost and where it contradicts itself, before it runs",
    "index": "look at tar shards once, decide what is trained on, measure its length, and show it",
    "fit": "train a recipe, or continue its run from the newest complete checkpoint",
    "validate": "validation losses and benchmarks of a checkpoint, as the run asks them on the way",
    "test": "every question of a recipe's benchmarks, asked of a checkpoint",
    "predict": "answer a file of questions about pictures",
    "score": "score a file of answers, without a model",
    "compare": "the difference between two validations, with its interval",
    "ask": "ask a trained model about a picture",
    "import": "make a run of a released LLaVA model",
    "export": "write a run as a Hugging Face LLaVA folder, and prove it equal",
}
WITHOUT_TRAINER = {
    "plan": "components.plan_command",
    "index": "components.index_command",
    "ask": "components.ask",
    "score": "components.score",
    "compare": "components.compare",
    "import": "components.huggingface.import_command",
    "export": "components.huggingface.export_command",
}
WITHOUT_RECIPE = {"ask", "score", "compare", "import", "export"}
MAX_ERROR_LINES = 15


def main(arguments: list[str]) -> int:
    """Run one command.

    Args:
        arguments: The command and its options, as on the command line.

    Returns:
        The exit code: 0 when all went well, 2 when the user can mend what went wrong.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        near = get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return _fail(f"'{command}' is not a command.{hint} Commands: {', '.join(COMMANDS)}.")
    # threads that wait for one another soon yield their core: on a laptop, training and data workers share few of them
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # micro-batches differ in their tokens: memory of a GPU that grows in place is not left in pieces
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if command == "plan":  # which fetches nothing, whatever a recipe names
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        # every import below waits until it is needed: what a user can mend is told at once, not after seconds of loading torch
        if command not in WITHOUT_RECIPE:
            from components.recipe_files import NO_RECIPE, check_recipes

            check_recipes(arguments[1:])
            if arguments[1:] == [] and command not in WITHOUT_TRAINER:
                raise RecipeError(NO_RECIPE)
        if command in WITHOUT_TRAINER:
            return importlib.import_module(WITHOUT_TRAINER[command]).main(arguments[1:])
        from components.command_line import RecipeCLI

        RecipeCLI(arguments)
    except (RecipeError, ArgumentError) as error:
        return _fail(str(error))
    return 0


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python main.py COMMAND ...",
            "",
            str(__doc__),
            "",
            "commands:",
            *lines,
            "",
            "python main.py COMMAND --help explains a command's options; --print_config after a recipe shows it resolved.",
            "first steps: python main.py fit --config recipes/quickstart.yaml",
        ]
    )


def _fail(message: str) -> int:
    lines = [line for line in message.splitlines() if line.strip()]
    if len(lines) > MAX_ERROR_LINES:
        lines = [*lines[: MAX_ERROR_LINES - 3], "...", *lines[-2:]]
    print("\n".join(["error: " + lines[0], *lines[1:]]), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
