"""Names of shards: braces and globs as in bash, and how a shard is called inside an index.

Source: the GNU Bash manual, section 3.5.1 (brace expansion).
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from components.errors import RecipeError

MAX_NAMES = 1_000_000
"""Names that one pattern may stand for: a typing error like {0..99999999999} fills no memory."""

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")


def is_remote(name: str) -> bool:
    """Whether a name is a url (`s3://`, `gs://`, `https://` ...) and not a path on this machine."""
    return "://" in name


def expand(pattern: str) -> list[str]:
    """A pattern in, the names it stands for out: sorted, each once.

    Args:
        pattern: A path or a url. `{00000..00099}` counts up, with zeros in front as in the pattern; `{a,b}` lists; paths on this
            machine may hold `*`, `?` and `[...]` too, and `~`.

    Raises:
        RecipeError: There is no such file, or the pattern stands for more than 1,000,000 names.
    """
    if not pattern.strip():
        raise RecipeError("A name of shards is empty. Name tar files, for example data/{00000..00099}.tar.")
    if is_remote(pattern) and "*" in pattern:
        raise RecipeError(f"Shards {pattern}: urls are not searched for *. List them in braces, for example {{00000..00099}}.")
    names: set[str] = set()
    for name in _braces(pattern):
        names.update([name] if is_remote(name) else _globbed(name))
        if len(names) > MAX_NAMES:
            raise RecipeError(f"Shards {pattern} stands for more than {MAX_NAMES:,} names. Correct the numbers in the braces.")
    found = sorted(names)
    if not any(is_remote(name) or os.path.exists(name) for name in found):  # noqa: PTH110 (75,000 Path objects take long)
        raise RecipeError(f"Shards {pattern}: no such file in {Path.cwd()}. Correct the path, or quote the pattern from the shell.")
    return found


def expand_all(patterns: list[str]) -> list[str]:
    """Several patterns in, the names that they stand for out: sorted, each once."""
    return sorted({name for pattern in patterns for name in expand(pattern)})


def names_in_index(shards: list[str]) -> list[str]:
    """Paths or urls of shards in, how their files in an index are called out: `00000`, or `part_0/00000` where names repeat.

    Raises:
        RecipeError: Two shards would have one name.
    """
    paths = [shard.partition("?")[0] if "://" in shard else shard for shard in shards]  # a url may carry a signature
    names = [path.rpartition("/")[2].removesuffix(".tar") for path in paths]
    unique = set(names)
    if len(unique) < len(names):
        folders = [path.split("/")[:-1] for path in paths]
        common = next(
            (depth for depth, parts in enumerate(zip(*folders, strict=False)) if len(set(parts)) > 1), min(map(len, folders))
        )
        names = ["/".join(path.split("/")[common:]).removesuffix(".tar") for path in paths]
        unique = {name for name in names if not {"", ".."} & set(name.split("/")) and ":" not in name.partition("/")[0]}
    if len(unique) < len(names) or "" in unique or ".." in unique:
        counts = Counter(names)
        name = next(name for name in names if counts[name] > 1 or name not in unique or name in ("", ".."))
        same = [shard for shard, other in zip(shards, names, strict=True) if other == name]
        other = (same + [shard for shard in shards if shard not in same] + same)[1]
        raise RecipeError(
            f"Shards {same[0]} and {other} cannot be told apart in one index folder. Rename them, or index them apart."
        )
    return names


def _globbed(name: str) -> list[str]:
    name = os.path.expanduser(name)  # noqa: PTH111
    return glob.glob(name) if glob.has_magic(name) and not os.path.exists(name) else [name]  # noqa: PTH110, PTH207


def _braces(pattern: str) -> Iterator[str]:
    """Brace expansion. Braces around neither a range nor a list stand for themselves, as in bash."""
    if "{" not in pattern:
        yield pattern
        return
    for start in (at for at, character in enumerate(pattern) if character == "{"):
        parts, end = _parts(pattern, start)
        if parts is None:
            continue
        for part in parts:
            # the part may hold braces itself; what stands before has none that expand
            for middle in _braces(part):
                for rest in _braces(pattern[end:]):
                    yield pattern[:start] + middle + rest
        return
    yield pattern


def _parts(pattern: str, start: int) -> tuple[Iterator[str] | list[str] | None, int]:
    """What the braces that open at `start` list, and where the pattern goes on."""
    depth, commas = 0, [start]
    for at in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[at], 0)
        if pattern[at] == "," and depth == 1:
            commas.append(at)
        if depth == 0:
            numbers = _RANGE.fullmatch(pattern, start + 1, at)
            if len(commas) > 1:
                return [pattern[left + 1 : right] for left, right in zip(commas, commas[1:] + [at], strict=True)], at + 1
            return (_numbers(*numbers.groups()) if numbers else None), at + 1
    return None, start


def _numbers(first: str, last: str, step: str | None) -> Iterator[str]:
    """`00..10`: as many digits as the longer one has, where either begins with a zero."""
    padded = any(len(number.lstrip("-")) > 1 and number.lstrip("-")[0] == "0" for number in (first, last))
    width = max(len(first), len(last)) if padded else 0
    stride = abs(int(step or 1)) or 1
    start, stop = int(first), int(last)
    numbers = range(start, stop + 1, stride) if start <= stop else range(start, stop - 1, -stride)
    return (f"{number:0{width}d}" for number in numbers)
