"""What `plan` says of a GPU where routed experts' factors are in pages. No GPU is asked."""

from __future__ import annotations

import argparse

import pytest

from vllm_moe_lora.commands import plan
from vllm_moe_lora.probe import Answer

GIB, MIB = 2**30, 2**20


def said(pages, value, monkeypatch, memory=80.0, max_loras=32, rank=64):
    """Findings for a slot of rank 64 that takes 6 GiB for routed experts and 1 GiB for the rest."""
    monkeypatch.setenv("VLLM_MOE_LORA_MEMORY", value)
    found = Answer({"Unquantized, TritonExperts": 48}, True, 30 * GIB, 7 * GIB, 6 * GIB, 80 * GIB)
    found.wrapped, found.pages = 48, pages
    args = argparse.Namespace(
        data_parallel_size=1,
        enable_expert_parallel=False,
        gpu_memory_utilization=0.9,
        lora_target_modules=None,
        memory=memory,
    )
    return plan._check_device(args, 1, found, max_loras, rank, 16)


def test_both_figures(monkeypatch):
    for pages in ("on", "possible"):
        (text,) = [one.what for one in said(pages, "6GiB", monkeypatch) if "in pages" in one.what]
        assert "32 dense slots of rank 64 take 192.00 GiB" in text
        assert "768.00 MiB for each 8 of its own ranks, of 6.00 GiB in all" in text
        assert ("VLLM_MOE_LORA_KERNELS=ours" in text) == (pages == "possible")
    assert not any("in pages" in one.what for one in said("", "6GiB", monkeypatch))


@pytest.mark.parametrize(
    ("pages", "value", "fits"),
    [("on", "6GiB", True), ("on", "0.25", False), ("possible", "6GiB", False)],
)
def test_memory(monkeypatch, pages, value, fits):
    """42 GiB are free. 32 slots take 32 GiB without routed experts, and 192 with them."""
    last = said(pages, value, monkeypatch)[-1]
    assert last.well == fits
    if pages == "on":
        took = {"6GiB": "38.00 GiB", "0.25": "51.50 GiB"}[value]  # whole blocks of 0.75 GiB
        assert f"32 take {took}" in last.what
    if not fits:
        assert last.cure == {"on": "VLLM_MOE_LORA_MEMORY=10240MiB"}.get(pages, "--max-loras 5")


def test_dense_slots_that_are_smaller(monkeypatch):
    (text,) = [
        one.what for one in said("on", "0.25", monkeypatch, max_loras=2) if "pages" in one.what
    ]
    assert "of 12.00 GiB in all" in text


def test_no_room_for_any(monkeypatch):
    found = [one for one in said("on", "500MiB", monkeypatch) if "in pages" in one.what]
    assert [one.well for one in found] == [False]
    assert found[0].cure == "raise VLLM_MOE_LORA_MEMORY to 768MiB or more"
