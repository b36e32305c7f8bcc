"""The table of model classes, against the sources of the releases that are here. Nothing is run."""

from __future__ import annotations

import os
import re

import pytest
import unpacked
from packaging.version import Version
from sources_of_classes import merged, moe_classes, read_directly, registered, wrappers

from vllm_moe_lora import supported
from vllm_moe_lora.models.hashes import HASHES
from vllm_moe_lora.models.rows import ROWS
from vllm_moe_lora.patching import digest
from vllm_moe_lora.sources import read, target_text

KNOWN = sorted(supported.releases(), key=Version)
# What a merged linear layer may be called; the lists also have parts of experts, and other words.
MERGED = re.compile(r"proj|qkv|wqa|wkv")
NOT_MERGED = {
    ("k_proj", "v_proj"): "Gemma 4 loads one tensor into both",
    ("qkv", "q"): "of vision towers",
}
# The indexer is built for configs with index_topk: those of the classes that have a row.
NO_INDEXER = ("DeepseekForCausalLM", "DeepseekV2ForCausalLM", "MistralLarge3ForCausalLM")
# Of vision towers, which upstream may leave without LoRA. An adapter with it is refused by name.
TOWERS = {"qkv"}
# Not decided here: the map is a name from elsewhere, or changed when the model is built, or the
# class makes instances of others (Grok's).
MAP_ELSEWHERE = ("Step5ForCausalLM", "MuseSparkForConditionalGeneration", "GrokForCausalLM")


# MoE classes without LoRA for which vLLM's error stays.
LEFT_ALONE = {
    "MiniMaxText01ForCausalLM": "nobody asked for it, and vLLM removed it with 0.24",
    "Qwen3ASRForConditionalGeneration": "dense: its file only imports from a MoE model's",
    "Qwen3ASRRealtimeGeneration": "the same",
}


def rows_of(release):
    return {t: row for row in ROWS if row.made_for(release) for t in row.targets}


@pytest.mark.parametrize("release", KNOWN)
def test_a_class_has_one_row(release):
    targets = [target for row in ROWS if row.made_for(release) for target in row.targets]
    assert len(targets) == len(set(targets))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_is_complete(row):
    assert row.known in ("engine", "source")
    assert row.until
    assert row.targets[0] in HASHES
    # A class with a tower says where its language model is.
    assert row.language_model or not (row.tower or row.connector)


def test_hashes_are_those_of_the_table():
    assert set(HASHES) == {target for row in ROWS for target in row.targets}


@pytest.mark.parametrize("release", unpacked.available())
def test_every_class_here_has_a_recorded_hash(release):
    tree, found = unpacked.tree(release), 0
    for target in rows_of(release):
        try:
            value = digest(target_text(tree, target))
        except LookupError:
            continue  # the release has the class elsewhere, or not yet
        first, last = HASHES[target][value]
        assert Version(first) <= Version(release) <= Version(last)
        found += 1
    assert found > 3


# 3 to 7 s a release.
SOME = [
    release
    for release in unpacked.available()
    if release in ("0.16.0", "0.32.0") or os.environ.get("MOE_LORA_ALL") == "1"
]


@pytest.mark.parametrize("release", SOME)
def test_merged_modules_are_packed(release):
    """All MoE classes: what their weights are merged into, vLLM or the table knows the parts of."""
    rows, missing, undeclared = rows_of(release), [], []
    classes = moe_classes(unpacked.tree(release))
    assert len(classes) > 30
    assert sum(bool(one.stacked) for one in classes.values()) > 0.8 * len(classes)
    for target, one in classes.items():
        row, name = rows.get(target), target.partition(":")[2]
        if row is not None and not row.refused:
            assert row.extends == one.declares, target
        if not one.declares and row is None:
            undeclared.append(target)
        if (not one.declares and row is None) or (row is not None and row.refused):
            continue  # no adapter is loaded
        packed = {**one.packed, **(row.packed if row is not None else {})}
        for whole, parts in one.stacked.items():
            if any((whole, part) in NOT_MERGED for part in parts) or name in MAP_ELSEWHERE:
                continue
            if not MERGED.search(whole):
                continue
            if whole == "wk_weights_proj" and name in NO_INDEXER:
                continue
            if not parts <= set(packed.get(whole, ())) and len(packed.get(whole, ())) != 1:
                missing.append((target, whole, sorted(parts), packed.get(whole)))
        built = set().union(*(merged(read(file)) for file in one.files)) - set(packed)
        if name in NO_INDEXER:
            built.discard("wk_weights_proj")
        if name not in MAP_ELSEWHERE:
            missing += [(target, whole) for whole in built - TOWERS]
    unread = [target for target, one in classes.items() if not one.stacked]
    around = set(wrappers(unpacked.tree(release))) - set(rows) - set(classes)
    print(f"{release}: {len(classes)} MoE classes; without LoRA and without a row: {undeclared}")
    print(f"the same, around any text model that a config names: {sorted(around)}")
    print(f"not decided, for no list of merged modules was found: {unread}; {MAP_ELSEWHERE}")
    assert not missing
    assert {target.partition(":")[2] for target in undeclared} <= set(LEFT_ALONE)


# Modules whose weight a step reads, and LoRA is computed all the same, or no adapter names them.
READ_AND_RIGHT = {
    ("DeepseekV4ForCausalLM", "gate"): "with MegaMoE only, which takes no LoRA",
    ("MuseSparkForConditionalGeneration", "fc"): "of a draft model",
    ("MuseSparkForConditionalGeneration", "o_proj"): "with sequence parallelism only",
    **{
        (f"{name}ForConditionalGeneration", "proj"): "of the vision tower"
        for name in ("Glm5Next", "Ernie4_5_VLMoe", "Glm4v", "Glm4vMoe", "GlmOcr")
    },
    ("Qwen3NextForCausalLM", "conv1d"): "a convolution: factors with three dimensions are refused",
    ("Glm5NextForConditionalGeneration", "wk_weights_proj"): "weights_proj is refused, wk is right",
    ("Glm5NextForCausalLM", "wk_weights_proj"): "the same",
    ("Glm5NextForCausalLM", "proj"): "of the wrapper's vision tower, in the same folder",
}


def refused_by(row):
    """Ends of the names that a row refuses, on whatever platform and with whatever config."""
    if row is None:
        return set()
    conditional = [*row.ignored_if.values(), *row.ignored_on.values()]
    return set(row.ignored).union(*conditional)


def whole_of(one, row):
    """Merged modules of which the row refuses all parts that adapters name."""
    refused = refused_by(row)
    parts = {whole: {p for p in ps if p[0] != "_"} for whole, ps in one.packed.items()}
    return {whole for whole, names in parts.items() if names and names <= refused}


@pytest.mark.parametrize("release", [r for r in SOME if r == "0.32.0" or len(SOME) > 2])
def test_modules_that_are_read_directly_are_refused(release):
    """LoRA around a module has no effect where the model reads the module's weight itself."""
    rows, missing = rows_of(release), []
    for target, one in moe_classes(unpacked.tree(release)).items():
        row, name = rows.get(target), target.partition(":")[2]
        if (not one.declares and row is None) or (row is not None and row.refused):
            continue
        files = set(one.files)
        for file in one.files:  # an implementation for a platform has a folder of its own
            if "model_executor" not in file.parts:
                files |= {*file.parent.glob("*.py"), *file.parent.parent.glob("*.py")}
        ends = {end.rpartition(".")[2] for end in refused_by(row)} | whole_of(one, row)
        for file in files:
            missing += [
                (target, module, file.name, line)
                for module, line in read_directly(read(file)).items()
                if module not in ends and (name, module) not in READ_AND_RIGHT
            ]
    assert not missing


def test_the_registry_is_read():
    assert len(registered(unpacked.tree(unpacked.available()[-1]))) > 100
