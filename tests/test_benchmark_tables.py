"""The tables that benchmarks write into the README, and the benchmark of one GPU at the size of a laptop."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import CLOSING, README, publish
from tests.benchmarks.gpu import CHECKS
from tests.benchmarks.gpu_steps import GRADIENT_LIMIT
from tests.benchmarks.profiles import OTHER, kind_of

ROOT = Path(__file__).parent.parent
OPENING = "<!-- benchmark: step -->"


def test_tables_take_the_place_of_the_last_ones(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{OPENING}\nold\n{CLOSING}\nafter\n<!-- benchmark: gpu -->\nother\n{CLOSING}\n")
    for text in ("new", "newer\n\n| a |"):
        publish("step", f"\n{text}\n", readme)
        assert readme.read_text() == (f"before\n{OPENING}\n{text}\n{CLOSING}\nafter\n<!-- benchmark: gpu -->\nother\n{CLOSING}\n")


@pytest.mark.parametrize("text", ["no place", f"{OPENING}\nnever closed", f"{OPENING}\n<!-- benchmark: gpu -->\n{CLOSING}\n"])
def test_a_place_that_is_not_there(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(SystemExit, match="has no place"):
        publish("step", "new", readme)
    assert readme.read_text() == text


def test_tables_of_the_readme_say_where_they_are_from():
    blocks = re.findall(r"<!-- benchmark: (\w+) -->\n(.*?)" + CLOSING, README.read_text(), re.DOTALL)
    assert blocks
    for name, text in blocks:
        assert (ROOT / f"tests/benchmarks/{name}.py").is_file()
        assert re.match(rf"{name}: \d{{4}}-\d\d-\d\d .*commit [0-9a-f]{{7,}}\n", text), f"{name}: no date and commit"
        assert "dirty" not in text.splitlines()[0], f"{name}: measured on files that are not committed"
        assert "\n|" in text
        assert f"python -m tests.benchmarks {name} --readme" in README.read_text()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("void flash::flash_fwd_kernel<...>", "attention"),
        ("triton_red_fused_mul_silu_0", "compiled elementwise"),
        ("Memcpy HtoD (Pinned -> Device)", "copies and casts"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdam...>", "optimizer"),
        ("vectorized_elementwise_kernel", OTHER),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert kind_of(name) == kind


@pytest.mark.slow
@pytest.mark.parametrize("case", ["7b_full_336", "13b_align_224"])
def test_the_benchmark_of_one_gpu_on_a_laptop(case):
    small = ["--small", "--device", "cpu", "--warmup", "1", "--blocks", "2", "--steps", "1", "--profile", "--not-compiled"]
    command = [sys.executable, "-m", "tests.benchmarks", "gpu", *small, "--one", case]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert [row[2] for row in found["rows"]] == 2 * ["ours", "transformers", "ours, not compiled"]
    for kind in ("captions", "instructions"):
        rows = [row for row in found["rows"] if row[1] == kind]
        assert len({row[3] for row in rows}) == 1, "the same tokens"
        assert all(float(row[5].replace(",", "")) > 0 for row in rows)
    assert all(float(row[CHECKS.index("gradients differ by")]) < GRADIENT_LIMIT for row in found["checks"])
