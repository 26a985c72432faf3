"""Checks of types and shapes in every call of the project's functions, at the price that each function needs."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jaxtyping
from beartype import beartype

_with_shapes = jaxtyping.jaxtyped


def install(packages: list[str]) -> None:
    """Check what is imported from these packages from now on."""
    jaxtyping.jaxtyped = _checked  # by this name the import hook decorates
    jaxtyping.install_import_hook(packages, "beartype.beartype")


def _checked(decorated: Any = None, *, typechecker: Callable) -> Any:
    """jaxtyping binds the arguments of every call to compare their shapes; where there are none, beartype alone is as strict."""
    if decorated is None:
        return partial(_checked, typechecker=typechecker)
    function = decorated.__init__ if inspect.isclass(decorated) else decorated
    if not inspect.isfunction(function) or any(map(_may_be_shape, function.__annotations__.values())):
        return _with_shapes(decorated, typechecker=typechecker)
    if not inspect.isclass(decorated):
        return beartype(decorated)
    if "__dataclass_fields__" in vars(decorated):
        decorated.__init__ = beartype(function)
    return decorated


def _may_be_shape(annotation: Any) -> bool:
    return isinstance(annotation, str) or "jaxtyping." in repr(annotation)
