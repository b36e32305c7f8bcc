"""docs/architecture.md names functions and folders that exist."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from vllm_moe_lora.hooks import all_hooks

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_moe_lora"
TEXT = (ROOT / "docs" / "architecture.md").read_text()
# "module:function" or "module:Class.method", between backticks or in a label of the diagram
NAMES = sorted(set(re.findall(r"\b[a-z_][\w.]*:[A-Za-z_][\w.]*\w", TEXT)) - {"module:function"})


def test_names_are_found():
    assert len(NAMES) > 20
    assert "fitting.fit:fit" in NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("vllm.")])
def test_name_exists(name):
    module, _, path = name.partition(":")
    thing = importlib.import_module(f"vllm_moe_lora.{module}")
    for part in path.split("."):
        thing = getattr(thing, part)
    assert callable(thing) or dataclasses.is_dataclass(thing)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("vllm.")])
def test_function_of_vllm_has_a_hook(name):
    assert name in {hook.target for hook in all_hooks()}


def test_the_table_has_every_folder():
    table = re.findall(r"^\| `([\w/]+)/` \|", TEXT, re.MULTILINE)
    folders = {file.parent.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py")}
    assert len(table) == len(set(table))
    assert set(table) == folders - {"."}


def test_the_table_is_in_the_order_of_imports():
    """As tests/unit/test_package.py has it, which checks the imports."""
    from test_package import ROOMS

    table = re.findall(r"^\| `(\w+)/` \|", TEXT, re.MULTILINE)
    assert table == [room for room in ROOMS if room in table]
