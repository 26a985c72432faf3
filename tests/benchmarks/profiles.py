"""Where the time of a profiled step goes, by kinds of work."""

import re

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


def where_time_goes(title: str, profiled: profile, device: torch.device) -> str:
    """A table of milliseconds and shares; on a GPU also how long none of its kernels ran."""
    on_gpu = device.type == "cuda"
    events = [event for event in profiled.events() if (event.device_type == DeviceType.CUDA) == on_gpu]
    spent: dict[str, float] = {}
    for event in events:
        own = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        spent[kind_of(event.name)] = spent.get(kind_of(event.name), 0.0) + own
    if on_gpu:
        spans = sorted((event.time_range.start, event.time_range.end) for event in events)
        busy, reached = 0.0, spans[0][0]
        for start, end in spans:
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        spent[IDLE] = reached - spans[0][0] - busy
    whole = sum(spent.values())
    rows = [[kind, f"{own / 1e3:.1f}", f"{own / whole:.1%}"] for kind, own in sorted(spent.items(), key=lambda item: -item[1])]
    return table(f"{title}: {whole / 1e3:.1f} ms", ["work", "ms", "share"], rows) + "\n"


def kind_of(name: str) -> str:
    """The kind of work of a kernel or operator."""
    return next((kind for kind, words in KINDS if re.search(words, name.lower())), OTHER)
