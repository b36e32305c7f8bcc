"""A patched tree alone does what the plugin does on a pristine one."""

from __future__ import annotations

import pytest
import test_adapters
import torch
import trees
import unpacked

cases = test_adapters.cases
# Of the old managers and of the newer ones; tests/patches/test_engine.py is of the installed one.
RELEASES = [r for r in ("0.11.1", "0.24.0", "0.33.0") if r in unpacked.available()]


@pytest.mark.parametrize("release", RELEASES)
def test_patched_tree_is_the_plugin(release, cases, tmp_path):
    want = test_adapters.ask(unpacked.tree(release), cases, tmp_path, plugin=True)
    have = test_adapters.ask(trees.patched(release), cases, tmp_path, plugin=False)
    assert want.pop("status")
    assert have.pop("status") == {}
    keys = have.pop("keys")  # of compiled artefacts: neither the plugin's nor bare vLLM's
    assert not set(keys) & {*want.pop("keys"), *want.pop("bare keys")}
    assert _same(have, want)


def _same(have, want):
    """Bit for bit, errors word for word."""
    if isinstance(want, dict):
        return have.keys() == want.keys() and all(_same(have[k], want[k]) for k in want)
    if isinstance(want, list):
        return len(have) == len(want) and all(map(_same, have, want))
    return torch.equal(have, want) if isinstance(want, torch.Tensor) else have == want
