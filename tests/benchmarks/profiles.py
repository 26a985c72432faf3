"""Where the time of a profiled step goes, by kinds of work."""

import re
from collections.abc import Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from tests.benchmarks import table

KINDS = (
    ("attention", r"flash|fmha|attention|softmax"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|^aten::(mm|addmm|bmm|linear|baddbmm)$|matmul"),
    ("optimizer", r"adam|multi_tensor"),
    ("copies and casts", r"memcpy|memset|copy|cat"),
    ("compiled elementwise", r"triton|cpp_fused"),
)
"""Kinds of work by words in the names of kernels, the first that fits; what fits none is other elementwise work."""
OTHER, IDLE = "other", "nothing runs"
LONGEST, NAME_WIDTH = 14, 90
"""Kernels that are listed, and letters of their names."""


def where_time_goes(title: str, profiled: profile, device: torch.device) -> str:
    """A table of milliseconds and shares; on a GPU also how long none of its kernels ran, and which kernels took longest."""
    if device.type != "cuda":
        return _table(title, _spent((kind_of(event.name), event.self_cpu_time_total) for event in profiled.events()))
    # annotations, such as Lightning's around a whole step, span the kernels inside them
    kernels = [event for event in profiled.events() if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    spent = _spent((kind_of(kernel.name), kernel.time_range.elapsed_us()) for kernel in kernels)
    busy, reached = 0.0, (first := min(kernel.time_range.start for kernel in kernels))
    for start, end in sorted((kernel.time_range.start, kernel.time_range.end) for kernel in kernels):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    longest = _spent((kernel.name[:NAME_WIDTH].replace("|", " "), kernel.time_range.elapsed_us()) for kernel in kernels)
    return _table(title, spent | {IDLE: reached - first - busy}) + _table("Its longest kernels", longest, LONGEST)


def _spent(events: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Sums of microseconds by name."""
    spent: dict[str, float] = {}
    for name, microseconds in events:
        spent[name] = spent.get(name, 0.0) + microseconds
    return spent


def _table(title: str, spent: dict[str, float], rows: int | None = None) -> str:
    whole = sum(spent.values())
    ordered = sorted(spent.items(), key=lambda item: -item[1])[:rows]
    cells = [[name, f"{own / 1e3:.1f}", f"{own / whole:.1%}"] for name, own in ordered]
    return table(f"{title}: {whole / 1e3:.1f} ms", ["work", "ms", "share"], cells) + "\n"


def kind_of(name: str) -> str:
    """The kind of work of a kernel or operator."""
    return next((kind for kind, words in KINDS if re.search(words, name.lower())), OTHER)
