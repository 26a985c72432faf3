"""How pictures are decoded and made square, as recipes and options name it; what each does is said in `components/images.py`."""

from typing import Literal

Decoding = Literal["llava", "upright"]
SquareMode = Literal["pad", "crop", "squash"]
