"""A patched tree alone does what the plugin does on a pristine one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import test_adapters
import torch
import unpacked

from vllm_moe_lora.cli import main

cases = test_adapters.cases
PATCHES = Path(__file__).parents[2] / "patches"
RELEASES = [r for r in test_adapters.RELEASES if (PATCHES / f"v{r}").is_dir()]


@pytest.mark.parametrize("release", RELEASES)
def test_patched_tree_is_the_plugin(release, cases, tmp_path):
    pristine = unpacked.tree(release)
    tree = tmp_path / f"v{release}"
    shutil.copytree(pristine / "vllm", tree / "vllm", ignore=shutil.ignore_patterns("__pycache__"))
    assert main(["patches", "apply", "--tree", str(tree)]) == 0
    want = test_adapters.ask(pristine, cases, tmp_path, plugin=True)
    have = test_adapters.ask(tree, cases, tmp_path, plugin=False)
    assert want.pop("status")
    assert have.pop("status") == {}
    assert _same(have, want)


def _same(have, want):
    """Bit for bit, errors word for word."""
    if isinstance(want, dict):
        return have.keys() == want.keys() and all(_same(have[k], want[k]) for k in want)
    if isinstance(want, list):
        return len(have) == len(want) and all(map(_same, have, want))
    return torch.equal(have, want) if isinstance(want, torch.Tensor) else have == want
