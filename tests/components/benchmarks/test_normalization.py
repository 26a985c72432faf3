"""Normalizers: every row of the official code's outputs, the contraction tables, and the rules one at a time."""

import hashlib
import json
from itertools import combinations
from typing import get_args

import pytest

from components.benchmarks.normalization import _CONTRACTIONS, _VIZWIZ_CONTRACTIONS, NORMALIZERS, Normalizer

COLUMNS = {"vqa_v2_official": "vqa_v2", "vizwiz_official": "vizwiz", "llava_m4c(=lmms-eval)": "evalai"}


def read(golden):
    folder = golden / "vqa_normalisation"
    rows = [json.loads(line) for line in (folder / "table.jsonl").read_text(encoding="utf-8").splitlines()]
    return rows, json.loads((folder / "EXPECTED.json").read_text())


def test_every_row_of_the_official_outputs(golden):
    rows, expected = read(golden)
    assert len(rows) == expected["n"] == 378
    for row in rows:
        for column, name in COLUMNS.items():
            assert NORMALIZERS[name](row["text"]) == row[column], (row, name)


def test_as_many_rows_differ_as_between_the_official_outputs(golden):
    rows, expected = read(golden)
    outputs = {column: [NORMALIZERS[name](row["text"]) for row in rows] for column, name in COLUMNS.items()}
    outputs["vlmevalkit"] = [row["vlmevalkit"] for row in rows]
    differ = {
        f"{one} vs {other}": sum(a != b for a, b in zip(outputs[one], outputs[other], strict=True))
        for one, other in combinations(outputs, 2)
    }
    assert differ == expected["pairs_that_differ"]


@pytest.mark.parametrize(("table", "digest"), [(_CONTRACTIONS, "98ebb291870ae45f"), (_VIZWIZ_CONTRACTIONS, "706c976c197c2061")])
def test_the_contractions_are_the_official_ones(table, digest):
    # digests of the official tables less what has no effect: keys with capitals (4), entries that change nothing (2)
    assert len(table) == 120 - 6
    assert hashlib.blake2b(json.dumps(sorted(table.items())).encode(), digest_size=8).hexdigest() == digest


# computed with the official code
@pytest.mark.parametrize(
    ("answer", "vqa_v2", "vizwiz", "evalai"),
    [
        ("", "", "", ""),
        ("  The  Cat\n", "cat", "cat", "cat"),
        ("a\tb\nc", "b c", "b c", "b c"),
        ("None of Ten", "0 of 10", "0 of 10", "0 of 10"),
        ("3.", "3", "3", "3"),
        ("no.9 and 2.5", "no.9 and 2.5", "no.9 and 2.5", "no.9 and 2.5"),
        ("t-shirt", "t shirt", "t shirt", "t shirt"),
        ("t -shirt and t-shirt", "t shirt and tshirt", "t shirt and tshirt", "t shirt and tshirt"),
        ("1,000-2,000", "10002000", "10002000", "1000 2000"),
        ("hello,world", "hello world", "hello world", "helloworld"),
        ("١,٢-٣", "١٢٣", "١٢٣", "١٢ ٣"),
        ("7:30 & 50% $#*", "7:30 & 50% $#*", "7:30 & 50% $#*", "7:30 & 50% $#*"),
        ("Lay's", "lay's", "lay's", "lay 's"),
        ("dont", "don't", "don’t", "don't"),
        ("DONT. cant", "don't can't", "don’t can't", "don't can't"),
        ("Im Ive", "im ive", "im ive", "im ive"),
        ("somebody'd let's she's", "somebodyd let's she's", "somebody'd let's she's", "somebodyd let 's she 's"),
        ("y’allll", "y’allll", "y’all’ll", "y’allll"),
        ("y'all'dve couldn'tve", "y'all'd've couldn't've", "y'all'dve couldn’t’ve", "y'all'd've couldn't've"),
        (".a" * 33, "a" * 32 + ".a", "a" * 32 + ".a", "a" * 32 + ".a"),
    ],
)
def test_one_rule_at_a_time(answer, vqa_v2, vizwiz, evalai):
    assert [NORMALIZERS[name](answer) for name in ("vqa_v2", "vizwiz", "evalai")] == [vqa_v2, vizwiz, evalai]


@pytest.mark.parametrize(
    ("answer", "short", "gqa"), [(" Yes. ", "yes", " yes. "), ("Yes..", "yes.", "yes"), ("A cat", "a cat", "a cat"), ("", "", "")]
)
def test_short_and_gqa(answer, short, gqa):
    assert (NORMALIZERS["short"](answer), NORMALIZERS["gqa"](answer)) == (short, gqa)


def test_a_recipe_may_name_every_normalizer():
    assert get_args(Normalizer) == tuple(NORMALIZERS)
