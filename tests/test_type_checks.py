"""The checks that all other tests rely on: types and shapes of arguments, results and fields."""

import importlib
import sys

import pytest
import torch
import type_checks

MODULE = """
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


def shapes(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return a if len(a) > 1 else a[:0]


def texts(a: "Float[Tensor, ' n']", b: "Float[Tensor, ' n']") -> None:
    pass


def lists(a: list["Float[Tensor, 'n']"], b: list["Float[Tensor, 'n']"]) -> None:
    pass


def types(a: int, b: str = "") -> str:
    return b if a else 0


def numbers():
    def inside(a: int) -> int:
        return a

    return inside


class Holder:
    def __init__(self, a: int) -> None:
        self.a = a

    def method(self, a: Float[Tensor, "n n"]) -> int:
        return self.a

    @staticmethod
    def static(a: int) -> int:
        return a


@dataclass
class Types:
    a: int


@dataclass
class Shapes:
    a: Float[Tensor, " n"]
    b: Float[Tensor, " n"]
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checked")
    (folder / "is_checked_here.py").write_text(MODULE)
    finders, path = list(sys.meta_path), list(sys.path)
    sys.path.insert(0, str(folder))
    type_checks.install(["is_checked_here"])
    yield importlib.import_module("is_checked_here")
    sys.meta_path[:], sys.path[:] = finders, path


ONE, TWO, THREE = torch.zeros(1), torch.zeros(2), torch.zeros(3)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (lambda m: m.shapes(TWO, TWO), lambda m: m.shapes(TWO, THREE)),
        (lambda m: m.shapes(TWO, TWO), lambda m: m.shapes(ONE, ONE)),  # the result is wrong
        (lambda m: m.texts(TWO, TWO), lambda m: m.texts(TWO, THREE)),
        (lambda m: m.lists([TWO], [TWO]), lambda m: m.lists([TWO], [THREE])),
        (lambda m: m.types(1), lambda m: m.types("1")),
        (lambda m: m.types(1), lambda m: m.types(0)),
        (lambda m: m.numbers()(1), lambda m: m.numbers()("1")),
        (lambda m: m.Holder(1), lambda m: m.Holder("1")),
        (lambda m: m.Holder(1).method(torch.zeros(2, 2)), lambda m: m.Holder(1).method(torch.zeros(2, 3))),
        (lambda m: m.Holder.static(1), lambda m: m.Holder.static("1")),
        (lambda m: m.Types(1), lambda m: m.Types("1")),
        (lambda m: m.Shapes(TWO, TWO), lambda m: m.Shapes(TWO, THREE)),
    ],
)
def test_what_is_wrong_is_refused(module, right, wrong):
    right(module)
    with pytest.raises(Exception, match="type|shape"):
        wrong(module)
