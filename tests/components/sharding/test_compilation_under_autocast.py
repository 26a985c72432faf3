"""Compiled blocks by the real compiler, which has conditions of its own on shapes: one graph for every packing."""

import pytest
import torch
from test_compilation import DEEP, TOWER_FROZEN, WARM, afresh, compile_blocks, counters, model_with, packings, pytestmark  # noqa: F401


@pytest.mark.slow
def test_no_packing_is_compiled_for_in_bfloat16(monkeypatch):
    model = model_with(DEEP, TOWER_FROZEN)
    compile_blocks(monkeypatch, model, "inductor")
    for step, batch in enumerate(packings()):
        with torch.compiler.set_stance("default" if step < WARM else "fail_on_recompile"):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.loss_sum(batch)
            loss.backward()
        if step == WARM - 1:
            compiled = dict(counters["inductor"])
            assert compiled and counters["stats"]["unique_graphs"] == 1
    assert counters["stats"]["unique_graphs"] == 1 and counters["graph_break"] == {}
    assert dict(counters["inductor"]) == compiled
