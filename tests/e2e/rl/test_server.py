"""Pushes from another process into vLLM's OpenAI server, by its own endpoint and its own keys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from engine_cases import PROMPTS
from server import Server

from vllm_moe_lora.adapters.errors import AdapterError
from vllm_moe_lora.rl import push
from vllm_moe_lora.tiny.oracle import load_tensors

pytestmark = [pytest.mark.cpu_engine, pytest.mark.long]
LIMIT = 1e-3


def agrees(found, expected):
    return all(abs(expected[-1][token] - value) <= LIMIT for token, value in found.items())


def test_server(make_case, tmp_path):
    case = make_case("qwen3_moe")
    for seed, name in enumerate("ab", start=1):
        case.add(name, seed=seed)
    pushed = {name: load_tensors(path) for name, path in case.adapters.items()}
    config = {"r": 8, "lora_alpha": 16, "target_modules": {"gate_proj", "q_proj"}}
    worker = ("--worker-extension-cls", "vllm_moe_lora.rl.Worker")
    prompt = PROMPTS[2]
    with Server(case.model, tmp_path, None, worker, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as server:
        for name in "abab":
            assert push(server.url, "policy", pushed[name], config) == "policy"
            for _ in range(2):  # the second finds the prompt in the prefix cache
                assert agrees(server.log_probs("policy", prompt), case.want(name)[2]), name
        damaged = {**pushed["a"], min(pushed["a"]): torch.full((8, 128), float("nan"))}
        with pytest.raises(AdapterError, match="NaN or infinite"):
            push(server.url, "policy", damaged, config)
        assert agrees(server.log_probs("policy", prompt), case.want("b")[2])
        assert agrees(server.log_probs(None, prompt), case.want(None)[2])
    assert len(list(Path("/dev/shm").glob(f"moe-lora-{os.getpid()}-*"))) <= 1, "kept for the next"


def test_closed(make_case, tmp_path):
    """A server without the worker class takes none, and one with a key wants the key."""
    case = make_case("qwen3_moe")
    case.add("a", seed=1)
    tensors, config = load_tensors(case.adapters["a"]), {"r": 8, "lora_alpha": 16}
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_API_KEY": "secret"}
    with Server(case.model, tmp_path, None, (), **env) as server:
        with pytest.raises(AdapterError, match="401"):
            push(server.url, "policy", tensors, config)
        with pytest.raises(AdapterError, match="worker_extension_cls"):
            push(server.url, "policy", tensors, config, api_key="secret")
