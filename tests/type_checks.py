"""Checks of types and shapes in every call of the project's functions, at the price that each function needs."""

import inspect
from collections.abc import Callable
from functools import partial
from importlib.machinery import SourceFileLoader
from types import CodeType
from typing import Any
from unittest.mock import patch

import jaxtyping
from beartype import beartype
from jaxtyping import _import_hook

_with_shapes = jaxtyping.jaxtyped


def install(packages: list[str]) -> None:
    """Check what is imported from these packages from now on."""
    jaxtyping.jaxtyped = _checked  # by this name the import hook decorates
    jaxtyping.install_import_hook(packages, "beartype.beartype")
    loader = _import_hook._JaxtypingLoader
    loader.exec_module = SourceFileLoader.exec_module
    loader.get_code = _code


def _code(loader: Any, name: str) -> CodeType | None:
    """As the hook's own, but only of its own modules: torch, imported by one of them, would be compiled anew as well."""
    file_of = partial(_import_hook._optimized_cache_from_source, loader._typechecker.get_hash())
    with patch("importlib._bootstrap_external.cache_from_source", file_of):
        return SourceFileLoader.get_code(loader, name)


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
    """Whether it is one, or holds one, or a text that could be one."""
    return any(sign in repr(annotation) for sign in ("jaxtyping.", "'", '"'))
