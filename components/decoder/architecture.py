"""The architecture a recipe states inline, made into a transformers config; unknown keys and values that differ are errors."""

import copy
import difflib
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from components.errors import RecipeError

KEY = "model.decoder.init_args.config"

# keys of every transformers config that say nothing of the architecture, and the cache, which only generation uses
_ARCHITECTURE_ALL_THE_SAME = {"model_type", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
NOT_ARCHITECTURE = {*PreTrainedConfig().to_dict(), "use_cache", "torch_dtype"} - _ARCHITECTURE_ALL_THE_SAME
# older hub configs write these; transformers gathers them in rope_parameters
_ROPE = {"rope_theta": "rope_parameters", "rope_scaling": "rope_parameters", "partial_rotary_factor": "rope_parameters"}
_ROPE_SETTINGS = {*RopeParameters.__annotations__, "type", "truncate"}
# may differ between recipe and weights where the recipe does not state them: the layers are the same
_WITHOUT_EFFECT = {"bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "pretraining_tp"}


def architecture(config: dict[str, Any]) -> PreTrainedConfig:
    """Inline keys in, transformers config out.

    Raises:
        RecipeError: `model_type` is missing or unknown, a key is unknown, or a value is impossible.
    """
    model_type: Any = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise RecipeError(
            f"{KEY} states model_type {model_type!r}, which transformers does not know.{_close(model_type, list(CONFIG_MAPPING))} "
            "State the model_type of the weights' config.json, such as llama, mistral, qwen2, qwen3 or phi3."
        )
    config_class = CONFIG_MAPPING[model_type]
    defaults = config_class().to_dict()
    known = {*defaults, *config_class.attribute_map} - NOT_ARCHITECTURE
    if "rope_parameters" in defaults:
        known |= _ROPE.keys()
    for key in config:
        if key in NOT_ARCHITECTURE:
            raise RecipeError(f"{KEY}.{key} has no effect on the architecture. Remove it.")
        if key not in known:
            raise RecipeError(f"{KEY}.{key} is not a key of {config_class.__name__}.{_close(key, known)} Correct or remove it.")
    for section in ("rope_parameters", "rope_scaling"):
        for key in config.get(section) or {}:
            if key not in _ROPE_SETTINGS and key not in (defaults.get("layer_types") or []):  # some keep one set for each kind
                raise RecipeError(f"{KEY}.{section}.{key} is not a setting of rotary embeddings.{_close(key, _ROPE_SETTINGS)}")
    try:
        # transformers writes into nested dictionaries
        return AutoConfig.for_model(**copy.deepcopy(config))
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        raise RecipeError(f"{KEY} is not a possible {config_class.__name__}: {error.__cause__ or error}") from error


def compare(config: dict[str, Any], weights: str) -> None:
    """The inline architecture must be that of the weights.

    Raises:
        RecipeError: The weights cannot be read, or differ.
    """
    try:
        theirs = AutoConfig.from_pretrained(weights)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise unreadable(weights, error) from error
    if problems := config_differences(config, theirs, "in the weights"):
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise RecipeError(f"{KEY} differs from the config of '{weights}'. State the weights' values:\n{lines}")


def config_differences(config: dict[str, Any], weights_config: PreTrainedConfig, where: str) -> list[str]:
    """What differs between the inline architecture and that of weights, one line a key.

    A key that the recipe leaves out has the default of transformers, which is as wrong as a wrong value if the weights have
    another one; hence every key of the architecture is compared.

    Args:
        config: The inline architecture.
        weights_config: The config of the weights.
        where: Where that config stands, such as "in the weights".
    """
    ours, theirs = architecture(config).to_dict(), weights_config.to_dict()
    if ours["model_type"] != theirs["model_type"]:  # the other keys do not compare
        return [f"model_type: {ours['model_type']!r} in the recipe, {theirs['model_type']!r} {where}"]
    stated = {_ROPE.get(key, key) for key in config}
    keys = ours.keys() - NOT_ARCHITECTURE - (_WITHOUT_EFFECT - stated)
    return [
        f"{key}: {ours.get(key)!r} {'in the recipe' if key in stated else 'by default'}, {theirs.get(key)!r} {where}"
        for key in sorted(keys)
        if ours.get(key) != theirs.get(key)
    ]


def unreadable(weights: str, error: Exception) -> RecipeError:
    """The error for weights that are not there."""
    return RecipeError(
        f"No decoder weights could be read from '{weights}' (key model.decoder.init_args.weights). Give a hub name that this "
        f"machine can reach, or a folder with config.json and safetensors files.\n{str(error).splitlines()[0]}"
    )


def _close(word: object, known: object) -> str:
    matches = difflib.get_close_matches(str(word), list(known), n=1)  # type: ignore[call-overload]
    return f" Did you mean {matches[0]}?" if matches else ""
