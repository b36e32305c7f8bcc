"""A child that loads other base weights into a running engine.

python reload.py JOB RESULT. JOB is JSON: model, dtype, prompts, adapters (name -> folder), and
rounds: [way, checkpoint, names]. Each round changes the weights and asks every prompt with each of
the names.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from vllm_moe_lora.tiny.oracle import load_tensors

VOCAB = 512


def nothing(llm, checkpoint):
    """The weights stay."""


def whole(llm, checkpoint):
    """vLLM's reload_weights from a checkpoint's folder."""
    llm.collective_rpc("reload_weights", kwargs={"weights_path": checkpoint})


def without_files(llm, checkpoint):
    """The same, and what is in memory of the adapters is all there is: their folders are gone."""
    for folder in json.loads(Path(sys.argv[1]).read_text())["adapters"].values():
        shutil.rmtree(folder)
    whole(llm, checkpoint)


def slept(llm, checkpoint):
    """As after level 2 of sleep up to 0.32: nothing is left in the slots, then reload_weights."""

    def forget(worker):
        for module in worker.model_runner.lora_manager._adapter_manager.modules.values():
            for name, value in vars(module).items():
                if name.endswith(("lora_a_stacked", "lora_b_stacked")):
                    for stack in value if isinstance(value, tuple | list) else (value,):
                        if isinstance(stack, torch.Tensor):  # on a CPU the experts' slots have none
                            stack.fill_(7.0)

    llm.collective_rpc(forget)
    whole(llm, checkpoint)


def half(llm, checkpoint):
    """vLLM's reload_weights with the tensors of layer 1 and no others."""
    part = [(k, t) for k, t in load_tensors(Path(checkpoint)).items() if ".layers.1." in k]
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(part)})


def live(llm, checkpoint):
    """load_weights of the live model, with one expert of layer 1, and nothing after it."""
    tensors = load_tensors(Path(checkpoint))
    part = [(k, t) for k, t in tensors.items() if ".layers.1.mlp.experts.3." in k]
    llm.apply_model(lambda model: model.load_weights(iter(part)))


def named(llm, checkpoint):
    """The same with the names that PEFT gives the weights of a wrapped module."""
    tensors = load_tensors(Path(checkpoint))
    part = [
        (k.replace("_proj.weight", "_proj.base_layer.weight"), t)
        for k, t in tensors.items()
        if ".layers.0.mlp.experts.3." in k
    ]
    llm.apply_model(lambda model: model.load_weights(iter(part)))


def ask(llm, job, names):
    """Log-probs [names * prompts, vocab] after each prompt."""
    loras = {n: LoRARequest(n, i, p) for i, (n, p) in enumerate(job["adapters"].items(), start=1)}
    params = SamplingParams(
        temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, logprobs=VOCAB
    )
    asked = [(prompt, name) for name in names for prompt in job["prompts"]]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in asked],
        params,
        lora_request=[loras.get(name) for _, name in asked],
        use_tqdm=False,
    )
    rows = [output.outputs[0].logprobs[0] for output in outputs]
    return torch.tensor([[row[token].logprob for token in range(VOCAB)] for row in rows])


def main(spec, result):
    job = json.loads(Path(spec).read_text())
    llm = LLM(
        job["model"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=16,
        max_logprobs=VOCAB,
        dtype=job["dtype"],
        enable_lora=True,
        max_loras=2,
        max_lora_rank=16,
    )
    found = []
    for way, checkpoint, names in job["rounds"]:
        globals()[way](llm, checkpoint)
        llm.reset_prefix_cache()
        found.append(ask(llm, job, names))
    torch.save(found, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)
