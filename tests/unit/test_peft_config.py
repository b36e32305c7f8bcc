"""docs/peft-config.md: every field of the installed PEFT's LoraConfig, and what it says is so."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from vllm_moe_lora.adapters.config import Config
from vllm_moe_lora.adapters.errors import AdapterError

PAGE = Path(__file__).parents[2] / "docs" / "peft-config.md"
PLAIN = {"r": 8, "lora_alpha": 16}


def rows():
    """Field -> what the page says about it."""
    found = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("| `"):
            _, fields, text, _ = line.split("|")
            for name in re.findall(r"`(\w+)`", fields):
                assert name not in found, f"{name} is there twice"
                found[name] = text.strip()
    return found


def peft_fields():
    """The fields that PEFT writes into adapter_config.json, read from its source."""
    root = Path(importlib.util.find_spec("peft").submodule_search_locations[0])
    found = set()
    for file, names in (
        ("config.py", ("PeftConfigMixin", "PeftConfig")),
        ("tuners/lora/config.py", ("LoraConfig",)),
    ):
        for node in ast.walk(ast.parse((root / file).read_text())):
            if isinstance(node, ast.ClassDef) and node.name in names:
                fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
                found |= {one.target.id for one in fields}
    return found


def test_every_field_of_peft_is_there():
    assert {"r", "peft_type", "target_parameters"} <= peft_fields()
    assert peft_fields() - rows().keys() == set(), "fields that docs/peft-config.md does not know"


@pytest.mark.parametrize("name", [name for name, text in rows().items() if text == "refused"])
def test_what_is_refused(name):
    with pytest.raises(AdapterError, match=f'"{name}" is set'):
        Config.from_dict({**PLAIN, name: {"some": 1}})


@pytest.mark.parametrize("name", [n for n, text in rows().items() if text.startswith("no effect")])
def test_what_has_no_effect(name):
    for value in (True, "text", {"some": 1}, [1]):
        config = Config.from_dict({**PLAIN, name: value})
        assert (config.scale("layers.0.q_proj", 8), config.orders()) == ((2.0, 8), None)


def test_initialisations():
    """Each value that PEFT knows is named; those that change the base model are refused."""
    root = Path(importlib.util.find_spec("peft").submodule_search_locations[0])
    source = (root / "tuners/lora/layer.py").read_text()
    known = set(re.findall(r'init_lora_weights(?:\.lower\(\))? == "(\w+)"', source))
    known |= set(re.findall(r'init_lora_weights\.startswith\("(\w+)"\)', source))
    assert {"pissa", "eva", "mica"} <= known
    refused, served = rows()["init_lora_weights"].split("refused", 1)
    for name in known:
        assert (f"`{name}`" in refused) != (f"`{name}`" in served), f"{name}: add it to the page"
        config = {**PLAIN, "init_lora_weights": name}
        if f"`{name}`" in refused:
            with pytest.raises(AdapterError, match=name):
                Config.from_dict(config)
        else:
            Config.from_dict(config)
