"""How an answer is made comparable with the reference, by name.

Source: `vqa_v2`: github.com/GT-Vision-Lab/VQA, commit a013f00, vqaEval.py; `vizwiz`: the current VizWiz API (Qing Li), copied in
github.com/AttentionX/InstructBLIP_PEFT, commit 8b0d453, lavis/common/vqa_tools/vqa_eval_vizwiz.py; `evalai`, `gqa`:
github.com/haotian-liu/LLaVA, commit c121f04, llava/eval/m4c_evaluator.py and scripts/convert_gqa_for_eval.py.
"""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Literal

_CACHED = 2**16  # crowds repeat themselves
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_MOST_PERIODS = 32  # the official code passes a flag of this value where the count belongs
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_STEMS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "": "ma'am o'clock 'ow's'at 'twas y'all",
}
_FORMS = [stem + ending for ending, stems in _STEMS.items() for stem in stems.split()]

# a form with one of its apostrophes left out stands for the form; the last entry is the wrong way round in the official table too
_CONTRACTIONS = {
    form[:place] + form[place + 1 :]: form for form in _FORMS for place, character in enumerate(form) if character == "'"
} | {"somebody'd": "somebodyd"}

# typographic apostrophes came into the VizWiz table, but not everywhere
_STRAIGHT_FORMS = set("ain't aren't can't could've couldn't we've where's who've".split())
_STRAIGHT_KEYS = {"couldn'tve", "hadn'tve"}


def _curly(word: str, straight: set[str]) -> str:
    return word if word in straight else word.replace("'", "’")


_VIZWIZ_CONTRACTIONS = {_curly(key, _STRAIGHT_KEYS): _curly(form, _STRAIGHT_FORMS) for key, form in _CONTRACTIONS.items()}


def short(answer: str) -> str:
    """Spaces around the answer, letter case and one period at its end do not count."""
    return answer.strip().lower().removesuffix(".").rstrip()


def gqa(answer: str) -> str:
    """Letter case and periods at the end do not count."""
    return answer.rstrip(".").lower()


@lru_cache(_CACHED)
def vqa_v2(answer: str) -> str:
    """Letter case, most punctuation, articles, number words and left-out apostrophes do not count."""
    return _as_vqa(answer, _CONTRACTIONS)


@lru_cache(_CACHED)
def vizwiz(answer: str) -> str:
    """As `vqa_v2`, but most contractions get a typographic apostrophe: they match no reference answer with a straight one."""
    return _as_vqa(answer, _VIZWIZ_CONTRACTIONS)


@lru_cache(_CACHED)
def evalai(answer: str) -> str:
    """As `vqa_v2` after commas and question marks are taken out and `'s` is set apart."""
    return _as_vqa(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's"), _CONTRACTIONS)


def _as_vqa(answer: str, contractions: Mapping[str, str]) -> str:
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    joined = re.search(r"\d,\d", text) is not None
    gone = {mark for mark in _MARKS if joined or f"{mark} " in text or f" {mark}" in text}
    text = text.translate({ord(mark): "" if mark in gone else " " for mark in _MARKS})
    text = re.sub(r"\.(?!\d)", "", text, count=_MOST_PERIODS)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


def none(answer: str) -> str:
    """Everything counts."""
    return answer


Normalizer = Literal["none", "short", "gqa", "vqa_v2", "vizwiz", "evalai"]
NORMALIZERS: dict[str, Callable[[str], str]] = {
    "none": none,
    "short": short,
    "gqa": gqa,
    "vqa_v2": vqa_v2,
    "vizwiz": vizwiz,
    "evalai": evalai,
}
