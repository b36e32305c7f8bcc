"""Child side of test_declared_classes.py: the classes of one release that have a row."""

from __future__ import annotations

import importlib
import json
import sys
import types
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import stage
import torch
from torch import nn


def instance(kind, row):
    """A model without layers: what `declare` reads, and vLLM's check of the interface."""
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    config = types.SimpleNamespace(q_lora_rank=1)
    if row.config:
        model.model = nn.Module()
        model.model.config = config
    else:
        model.config = config
    if row.language_model:
        setattr(model, row.language_model, nn.Module())
    return model


def check(kind, row):
    from vllm.model_executor.models.interfaces import supports_lora

    from vllm_moe_lora.models.declare import declare, row_of

    assert row_of(kind) is row, f"{kind}: another source, or another row"
    if row.refused:
        try:
            declare(instance(kind, row))
        except ValueError as error:
            return str(error)
        raise AssertionError(kind)
    model = instance(kind, row)
    before = supports_lora(model)
    declare(model)
    assert supports_lora(model)
    for whole, parts in row.packed.items():
        assert model.packed_modules_mapping[whole] == list(parts)
    if row.language_model:
        assert model.get_mm_mapping().language_model == [row.language_model]
    assert supports_lora(instance(kind, row)) == before, "the class was changed"
    return "upstream's" if before else "declared"


class Runner(nn.Module):
    """Stands in for the experts of a layer where vLLM looks for their class."""

    moe_config = types.SimpleNamespace(num_experts=3)


def manager_reads(model):
    """What vLLM's manager takes for the parts of experts; for a class as Granite's up to 0.24."""
    from unittest import mock

    from vllm.lora import utils

    from vllm_moe_lora.models.repair import expert_mapping

    model.mlp = nn.Module()
    model.mlp.experts = Runner()
    kind = "MoERunner" if hasattr(utils, "MoERunner") else "FusedMoE"
    with mock.patch.object(utils, kind, Runner):
        try:
            utils.process_packed_modules_mapping(model)
            before = "starts"
        except (AttributeError, ValueError) as error:
            before = str(error)
        count = expert_mapping(model)
        found = utils.process_packed_modules_mapping(model)["experts"]
        assert expert_mapping(model) == 0
    assert count == 3
    assert found == [f"experts.{i}.{p}_proj" for i in range(3) for p in ("gate", "down", "up")]
    return before


def early_check(release):
    """What 0.33 asks before it reads a weight. Returns the two errors for classes without LoRA."""
    from vllm.config.lora import LoRAConfig
    from vllm.config.model import ModelConfig

    from vllm_moe_lora import patching, supported
    from vllm_moe_lora.hooks import all_hooks

    hooks = [h for h in supported.made_for(release, all_hooks()) if h.feature == "model-classes"]
    assert len(hooks) == 3

    def config(name, declares=False):
        made = object.__new__(ModelConfig)
        info = types.SimpleNamespace(architecture=name, supports_lora=declares)
        vars(made).update(_model_info=info, _architecture=name, runner_type="generate", model="m")
        vars(made).update(
            dtype=torch.bfloat16, hf_config=types.SimpleNamespace(architectures=[name])
        )
        return made

    def error(name):
        try:
            LoRAConfig().verify_with_model_config(config(name))
        except ValueError as refused:
            return str(refused)
        return ""

    kimi, before = "KimiK25ForConditionalGeneration", error("KimiK25ForConditionalGeneration")
    assert "LoRA is not supported for Kimi" in before
    done = patching.apply(hooks, version=release, platform="cuda", hashes=supported.hashes(release))
    assert done.features == {"model-classes": "on"}, done
    assert config(kimi).is_lora_supported
    assert error(kimi) == ""
    assert config("Qwen3MoeForCausalLM", declares=True).is_lora_supported
    names = ("FlintForCausalLM", "BeamForCausalLM", "KimiK3ForConditionalGeneration")
    names += ("MiniMaxText01ForCausalLM",)
    found = [error(name) for name in names]
    patching.revert()
    assert error(kimi) == before
    return found


STUBS = ("", ".io", *(f".transforms{one}" for one in ("", ".functional", ".v2", ".v2.functional")))


def stand_in_for_torchvision():
    """Files of vision models import it. Nothing of it is called here."""
    for name in STUBS:
        name = f"torchvision{name}"
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None), __path__=[], __version__="0")


def main():
    stand_in_for_torchvision()
    _, version = stage.begin(torch.bfloat16)
    from vllm_moe_lora import supported
    from vllm_moe_lora.models.rows import ROWS

    release = supported.release_of(version)

    found, failed, granite = {}, {}, None
    for row in ROWS:
        for target in row.targets if row.made_for(release) else ():
            module, _, name = target.partition(":")
            try:
                kind = getattr(importlib.import_module(module), name)
            except Exception as error:  # what it wants of a GPU can fail in many ways
                failed[target] = repr(error)
                continue
            if f"{kind.__module__}:{name}" == target:  # else an older name of the same class
                found[name] = check(kind, row)
                if name == "GraniteMoeSharedForCausalLM":
                    granite = manager_reads(instance(kind, row))
    early = early_check(release) if release.startswith("0.33") else []
    told = {"found": found, "failed": failed, "early": early, "granite": granite}
    print(json.dumps({"release": release, **told}))


if __name__ == "__main__":
    main()
