"""The wheel as a user installs it: it has every file, and its demo needs no checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.cpu_engine


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(_source(folder / "source"))]
    subprocess.run(command, check=True, timeout=300)
    [made] = folder.glob("*.whl")
    return made


def _source(folder):
    """A copy of what git has, so that nothing of an earlier build is packed."""
    files = subprocess.run(
        ["git", "ls-files", "-z", "pyproject.toml", "README.md", "LICENSE", "vllm_moe_lora"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def test_it_has_every_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if name.startswith("vllm_moe_lora/")}
        meta = next(name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = archive.read(meta).decode()
        points = archive.read(meta.replace("METADATA", "entry_points.txt")).decode()
    package = ROOT / "vllm_moe_lora"
    wanted = {
        f"vllm_moe_lora/{file.relative_to(package).as_posix()}"
        for file in package.rglob("*")
        if file.is_file() and file.suffix in (".py", ".toml", ".typed", ".json")
    }
    assert found == wanted
    assert "[vllm.general_plugins]\nmoe_lora = vllm_moe_lora:register" in points
    assert "Classifier: Typing :: Typed" in metadata


def test_its_demo_is_right(wheel, tmp_path):
    """`vllm-moe-lora demo`: bare vLLM fails, and adapter == merged with the plugin."""
    place = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(place), str(wheel)], check=True, timeout=300)
    env = {**os.environ, "PYTHONPATH": str(place)}
    where = [sys.executable, "-c", "import vllm_moe_lora; print(vllm_moe_lora.__file__)"]
    found = subprocess.run(
        where, env=env, cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    assert found.startswith(str(place)), "not the checkout"
    done = subprocess.run(
        [sys.executable, str(place / "bin" / "vllm-moe-lora"), "demo", "--json"],
        env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    out = json.loads(done.stdout)
    assert out["right"]
    assert "rror" in out["bare_vllm"]
    assert all(row["mean_difference"] <= 0.1 * row["mean_effect"] for row in out["rows"])
