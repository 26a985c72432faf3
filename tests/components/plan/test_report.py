"""The report: its numbers are those of the facts, its rows add up, and it says what it leaves out."""

import re
from dataclasses import replace

import pytest
from some_facts import FACTS, MEMORY, WORKLOAD, a_choice, an_estimate, spoiled

from components.plan import Parameter, Unit
from components.plan.findings import Finding, findings_of
from components.plan.report import POWER_USAGE, Prices, compared, duration, report
from components.plan.samples import Share
from components.plan.simulate import Comparison

PRICES = Prices(gpu_hour=3.0, kg_co2_per_kwh=0.5)


def shown(facts, findings=()):
    return report(facts, list(findings), 0.5, PRICES)


def cells(text, name):
    """The cells of the row with a name."""
    return re.split(r"\s{2,}", re.search(rf"^{re.escape(name)} .*$", text, re.MULTILINE)[0])[1:]


def test_the_summary_says_what_a_step_is():
    text = shown(FACTS)
    assert "1,000 x 128 samples = 128,000" in text
    assert "8 ranks x 4 in a micro-batch x 4 accumulated" in text
    assert "30 steps, 3.0% of the run" in text
    assert "224 x 224 px, 256 patches, 256 visual tokens" in text
    assert "320 tokens: 256 visual and 64 text, of which 32 supervised" in text
    assert cells(text, "vision_tower")[:3] == ["1,000,000,000", "0", "frozen"]
    assert cells(text, "decoder")[2] == "2e-05"


def test_memory_adds_up_and_has_a_verdict():
    text = shown(FACTS)
    rows = text.partition("GiB on each GPU")[2].partition("fits")[0]
    *components, total = [float(number) for number in re.findall(r"[\d.]+$", rows, re.MULTILINE)]
    assert sum(components) == pytest.approx(total) == MEMORY.total
    assert "fits: a GPU has 79.0" in text
    small = replace(MEMORY, usable=20.0)
    assert "does not fit: a GPU has 20.0" in shown(replace(FACTS, estimate=an_estimate(memory=small)))


def test_flops_add_up():
    text = shown(FACTS).partition("TFLOP a sample")[2]
    parts = [float(cells(text, name)[0]) for name in WORKLOAD.flops]
    assert sum(parts) == pytest.approx(float(cells(text, "all")[0]), rel=0.01)
    assert cells(text, "all")[1:] == [f"{WORKLOAD.flops_per_sample * 128 / 1e12:.0f}", "100.0%"]


def test_what_is_exchanged_stands_beside_what_hides_it():
    text = shown(FACTS)
    assert cells(text, "all_gather") == ["4", "1.0", "1.00"]
    assert cells(text, "computing, to hide it behind") == ["3.00"]
    assert cells(text, "recipe") == ["1 x 8", "4", "4", "none", "29", "3.00", "4.00", "50%", f"{128 * 320 / 3:,.0f}", "50 min"]


def test_price_and_carbon_are_those_of_the_gpu_hours():
    hours = FACTS.estimate.gpu_hours
    kwh = hours * 0.4 * POWER_USAGE
    text = shown(FACTS)
    assert f"{hours:,.0f} GPU-hours, {3 * hours:,.0f} at 3 a GPU-hour" in text
    assert f"{kwh:,.0f} kWh at 400 W" in text and f"{kwh * 0.5:.1f} kg CO2" in text
    longer = an_estimate()
    longer = replace(longer, gpu_hours=1e5)
    assert f"{1e5 * 0.4 * POWER_USAGE * 0.5 / 1000:.1f} t CO2" in shown(replace(FACTS, estimate=longer))


def test_faster_schedules_come_with_their_lines():
    text = shown(replace(FACTS, choices=(a_choice(1.5), a_choice(1.2, accumulation=2))))
    assert cells(text, "A")[:3] == ["1 x 8", "16", "1"] and cells(text, "B")[:3] == ["1 x 8", "8", "2"]
    assert "A  the fastest that fits: trainer: {x: 1}" in text


def test_equal_units_are_one_row():
    trained, frozen = Parameter((10, 100), True), Parameter((100,), False)
    units = (
        *(Unit(f"decoder.lm.model.layers.{number}", (trained, frozen), True) for number in range(3)),
        Unit("projector", (trained,), True),
        Unit("model", (frozen,), True),
    )
    text = shown(spoiled(workload={"units": units}))
    assert cells(text, "decoder.lm.model.layers.*") == ["3", "1,100", "1,000"]
    assert cells(text.partition("sharding unit")[2], "projector") == ["1", "1,000", "all"]
    assert cells(text, "the rest") == ["1", "100", "frozen"]


def test_sources_that_are_elsewhere_have_no_epochs():
    shares = (Share("here", "a file", 0.25, 64_000, 0.5), Share("gone", "a file", 0.75, missing="no file"))
    text = shown(replace(FACTS, shares=shares))
    assert cells(text, "here") == ["25.0%", "64,000", "0.50"]
    assert cells(text, "gone") == ["75.0%", "not here"]


def test_a_laptop_has_no_gpu_figures():
    laptop = spoiled(running={"on_gpus": False, "layout": None, "strategy": "auto"}, machine=None, estimate=None)
    text = shown(laptop, findings_of(laptop))
    assert "no GPU" in text and "GiB" not in text and "sharding unit" not in text and "TFLOP" in text
    assert text.endswith("no findings\n")


def test_without_lengths_nothing_is_guessed():
    unknown = spoiled(lengths=None, estimate=None)
    text = shown(unknown, findings_of(unknown))
    assert "TFLOP" not in text and "of which" not in text and "finding (lengths)" in text


def test_findings_are_wrapped_and_their_overlays_are_not():
    overlay = "trainer: {" + ", ".join(f"key_{number}: {number}" for number in range(30)) + "}"
    text = shown(FACTS, [Finding("memory", "contradiction", "word " * 60 + f"\n{overlay}")])
    lines = text[text.index("contradiction (memory)") :].splitlines()
    assert all(len(line) <= 120 for line in lines[:-1]) and lines[-1].strip() == overlay


def test_formulas_and_simulation_are_compared():
    lines = [
        Comparison("calls", 4, 4),
        Comparison("bytes", 10, 8),
        Comparison("TFLOP", 1.004, 1.0, 0.01),
        Comparison("peak", 2.0, 1.0, None),
    ]
    text = compared(lines)
    assert cells(text, "calls")[-1] == "agrees" and cells(text, "bytes")[-2:] == ["+25.0%", "DIFFERS"]
    assert cells(text, "TFLOP")[-1] == "agrees" and cells(text, "peak")[-1] == "+100.0%"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.25, "4.2 s"),
        (100.0, "100 s"),
        (180.0, "3 min"),
        (3 * 3600.0, "3 h"),
        (26.9 * 86400, "27 days"),
        (8.6 * 86400, "8.6 days"),
    ],
)
def test_times_are_told_in_a_unit_of_their_size(seconds, text):
    assert duration(seconds) == text
