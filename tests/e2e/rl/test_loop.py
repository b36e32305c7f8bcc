"""examples/rl_loop.py learns, and its sampler and trainer agree."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cpu_engine, pytest.mark.long]
EXAMPLE = Path(__file__).parents[3] / "examples" / "rl_loop.py"
LINE = re.compile(r"(\w+): reward ([\d.]+) -> ([\d.]+), mismatch (\S+), with R3 (\S+)")


@pytest.mark.parametrize("options", [[], ["--quant", "gptq", "--noise"]], ids=["plain", "int4"])
def test_it_learns(tmp_path, options):
    plot = tmp_path / "plot.svg"
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--plot", str(plot), *options],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: [*map(float, numbers)] for name, *numbers in LINE.findall(done.stdout)}
    assert [*found] == (["bfloat16"] if options else ["float32", "bfloat16"])
    for first, last, _, _ in found.values():
        assert 0.3 < first < 0.7
        assert last > 0.9
    if not options:
        assert max(found["float32"][2:]) < 1e-5
    assert found["bfloat16"][3] < found["bfloat16"][2], "R3 brings them together"
    if find_spec("matplotlib"):
        assert "<svg" in plot.read_text()
    else:
        assert "no plot: matplotlib is not installed" in done.stderr
