"""ci/new_release.py: what it says of a release that moved nothing, or something."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
from tool import load

from vllm_moe_lora import supported
from vllm_moe_lora.hooks import all_hooks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: run ci/install.sh"
)
TARGET = "vllm.lora.peft_helper:PEFTHelper.from_dict"


@pytest.fixture(scope="module")
def tool():
    return load("new_release")


@pytest.fixture
def tree(tmp_path):
    """The installed release's Python files."""
    installed = Path(importlib.util.find_spec("vllm").origin).parent
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.json")
    return shutil.copytree(installed, tmp_path / "vllm", ignore=ignore).parent


def test_nothing_moved(tool, tree, capsys):
    assert tool.main(["0.32.1", "--tree", str(tree)]) == 0
    out = capsys.readouterr().out
    assert "vLLM 0.32.1, beside 0.32.0" in out
    row = out.partition('[releases."0.32.1"]\n')[2].partition("\n\n")[0].splitlines()
    assert row == [f'{name} = "source"' for name in sorted(supported.releases()["0.32.0"])]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("def from_dict", "def from_table"), "gone; from_dict is in"),
        (lambda text: text.replace("def from_dict(cls,", "def from_dict(cls, /,"), "changed"),
    ],
)
def test_something_moved(tool, tree, capsys, change, said):
    file = tree / "vllm" / "lora" / "peft_helper.py"
    old = file.read_text()
    file.write_text(change(old))
    assert file.read_text() != old
    assert tool.main(["0.32.1", "--tree", str(tree)]) == 1
    out = capsys.readouterr().out
    assert f"✗ {TARGET}: {said}" in out
    assert f'# adapters = "source"  # read first: {TARGET}' in out
    assert 'isolation = "source"\n' in out, "other features are not touched"
    assert any(hook.target == TARGET and hook.feature == "adapters" for hook in all_hooks())
