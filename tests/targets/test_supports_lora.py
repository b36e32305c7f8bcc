"""Which of vLLM's experts ignore LoRA: the list is checked against the installed sources."""

from __future__ import annotations

import ast
import importlib.util
import types
from pathlib import Path

import pytest

from vllm_moe_lora.adapters.errors import AdapterError
from vllm_moe_lora.patching import MARK
from vllm_moe_lora.targets import supports_lora


def _classes():
    """name -> (names of bases, whether it has an `apply`, whether that looks at the context).

    A class that says itself that it takes no LoRA has no bases here.
    """
    found = {}
    root = Path(importlib.util.find_spec("vllm").origin).parent
    for file in (root / "model_executor/layers/fused_moe").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
            applies = [
                one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "apply"
            ]
            looks = any("_lora_context" in ast.unparse(one) for one in applies)
            passes_on = any("super().apply" in ast.unparse(one) for one in applies)
            own = {one.name: ast.unparse(one) for one in node.body if hasattr(one, "name")}
            if "return False" in own.get("supports_lora", ""):
                bases = []
            found[node.name] = (bases, bool(applies), looks or passes_on)
    return found


def test_the_list_is_complete():
    classes = _classes()

    def says_so(name):
        bases = classes.get(name, ((), False, False))[0]
        return name == "LoRAExpertsMixin" or any(says_so(base) for base in bases)

    def looks(name):
        """By the first `apply` on its line of ancestors."""
        bases, applies, looks_itself = classes.get(name, ((), False, False))
        return looks_itself if applies else any(looks(base) for base in bases)

    claiming = {name for name in classes if says_so(name)} - {"LoRAExpertsMixin"}
    concrete = {name for name in claiming if not name.endswith("Base")}
    assert {"TritonExperts", "MarlinExperts"} <= {name for name in concrete if looks(name)}
    assert {name for name in concrete if not looks(name)} == set(supports_lora.IGNORING)


def _wrapper(experts, **parallel):
    config = types.SimpleNamespace(moe_parallel_config=types.SimpleNamespace(**parallel))
    return types.SimpleNamespace(
        base_layer=types.SimpleNamespace(moe_config=config, layer_name="layers.0.mlp.experts"),
        _moe_kernel=types.SimpleNamespace(fused_experts=experts),
    )


def test_experts_that_move_are_refused_at_start_and_at_load():
    cure = r"^layers\.0\.mlp\.experts: --enable-eplb moves .* Start without --enable-eplb"
    with pytest.raises(NotImplementedError, match=cure):
        supports_lora.check_layer(_wrapper(None, enable_eplb=True))
    with pytest.raises(AdapterError, match=cure):
        supports_lora.check_adapter("layers.0.mlp.experts", _wrapper(None, enable_eplb=True))
    supports_lora.check_layer(_wrapper(None))
    supports_lora.check_adapter("layers.0.mlp.experts", _wrapper(None))


def test_a_growing_engine_is_refused_where_factors_move(monkeypatch):
    monkeypatch.setattr(supports_lora, "_factors_move", lambda: True)
    supports_lora.check_layer(_wrapper(None, enable_eplb=True))
    monkeypatch.setattr(supports_lora.data_parallel, "parallel_config", "enable_elastic_ep".__eq__)
    cure = r"^layers\.0\.mlp\.experts: --enable-elastic-ep changes .* Start without --enable-el"
    with pytest.raises(NotImplementedError, match=cure):
        supports_lora.check_layer(_wrapper(None, enable_eplb=True))
    supports_lora.check_layer(_wrapper(None))


def test_experts_of_several_batches_are_refused_at_start_and_at_load():
    cure = (
        r"^layers\.0\.mlp\.experts: with --data-parallel-size 4 .* Start 4 servers without data "
        r"parallelism, .* or without --enable-lora\."
    )
    with pytest.raises(NotImplementedError, match=rf"{cure} If no adapter .*--lora-target-modules"):
        supports_lora.check_layer(_wrapper(None, dp_size=4))
    with pytest.raises(AdapterError, match=rf"{cure}$"):
        supports_lora.check_adapter("layers.0.mlp.experts", _wrapper(None, dp_size=4))
    supports_lora.check_layer(_wrapper(None, dp_size=1))
    supports_lora.check_adapter("layers.0.mlp.experts", _wrapper(None, dp_size=1))


def test_an_adapter_that_would_be_ignored_is_refused():
    def wrapper(name):
        return _wrapper(type(name, (), {})())

    supports_lora.check_adapter("layers.0.mlp.experts", wrapper("MarlinExperts"))
    with pytest.raises(AdapterError, match=r"layers\.0.*TritonWNA16Experts.*--tensor-parallel"):
        supports_lora.check_adapter("layers.0.mlp.experts", wrapper("TritonWNA16Experts"))


def test_experts_that_a_hook_has_taught_are_like_any_other():
    def apply(self):
        return None

    kind = type("TritonWNA16Experts", (), {"apply": apply, "supports_lora": lambda: True})
    wrapper = _wrapper(kind())
    assert not supports_lora.takes_lora(kind)
    setattr(apply, MARK, "a hook")
    assert supports_lora.takes_lora(kind)
    supports_lora.check_adapter("layers.0.mlp.experts", wrapper)
