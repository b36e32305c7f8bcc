"""A child in which verl 0.9.1's own files push adapters, as its rollout worker does.

python verl_pushing.py VERL JOB RESULT. VERL is the folder of the unpacked wheel. What stands in for
verl's packages that want ray or a GPU is in `install`; the files that talk to vLLM are verl's.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import types
from pathlib import Path

import torch

VOCAB = 512
EXTENSION = "verl.workers.rollout.vllm_rollout.utils.vLLMColocateWorkerExtension"


def install(folder):
    """Make verl's modules importable without ray."""
    packages = ("verl", "verl.utils", "verl.third_party", "verl.workers", "verl.workers.rollout")
    for name in (*packages, "verl.workers.rollout.vllm_rollout"):
        module = types.ModuleType(name)
        module.__path__ = [str(Path(folder, *name.split(".")))]
        sys.modules[name] = module

    async def ensure_async_iterator(items):
        for item in items:
            yield item

    def get_version(package):
        import vllm

        return vllm.__version__

    _module("verl.third_party.vllm", get_version=get_version)
    _module("verl.workers.rollout.utils", ensure_async_iterator=ensure_async_iterator)
    # FP8 of the base model: Triton kernels.
    _module(
        "verl.utils.vllm.vllm_quant_utils",
        apply_vllm_quant_patches=None,
        is_quantized_model=lambda config: False,
        load_quanted_weights=None,
    )
    nothing = types.SimpleNamespace(
        synchronize=lambda: None, empty_cache=lambda: None, ipc_collect=lambda: None
    )
    import verl.utils.device as device

    device.get_torch_device = lambda: nothing
    device.is_support_ipc = lambda: False


def _module(name, **content):
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


def send(llm, tensors, config):
    """verl's sender in a thread, its receiver in the worker."""
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    (handle,) = llm.collective_rpc("_get_zmq_handle")
    sender = BucketedWeightSender(handle, bucket_size_mb=1, use_shm=True)
    pairs = [(name, tensor.contiguous()) for name, tensor in tensors.items()]
    thread = threading.Thread(
        target=lambda: asyncio.run(sender.async_send_weights(pairs)), daemon=True
    )
    thread.start()
    how = {"peft_config": config, "base_sync_done": True, "use_shm": True}
    llm.collective_rpc("update_weights_from_ipc", kwargs=how)
    thread.join(30)  # if it fails there, the sender waits for ever


opened = []


def _watch(event, args):
    if event == "open" and isinstance(args[0], str) and "adapter" in Path(args[0]).name:
        opened.append(args[0])


def main(folder, spec, result):
    install(folder)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    job = json.loads(Path(spec).read_text())
    adapters = torch.load(job["adapters"], weights_only=True)
    llm = LLM(
        job["model"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        max_logprobs=VOCAB,
        dtype="float32",
        enable_lora=True,
        max_loras=1,
        max_lora_rank=16,
        enable_prefix_caching=True,
        worker_extension_cls=EXTENSION,
        **job["options"],
    )
    llm.collective_rpc("monkey_patch_model", kwargs={"vocab_size": VOCAB})
    sys.addaudithook(_watch)
    params = SamplingParams(
        temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, logprobs=VOCAB
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]

    def ask(request):
        outputs = llm.generate(prompts, params, lora_request=request, use_tqdm=False)
        steps = [output.outputs[0].logprobs[0] for output in outputs]
        rows = torch.tensor([[step[token].logprob for token in range(VOCAB)] for step in steps])
        return rows, max(output.num_cached_tokens for output in outputs)

    found = {"base": ask(None)[0], "answers": [], "cached": [], "errors": {}}
    request = LoRARequest("123", 123, "simon_lora_path")  # as verl's server asks
    for name in job["order"]:
        send(llm, *adapters[name])
        rows, cached = ask(request)
        found["answers"].append(rows)
        found["cached"].append((cached, ask(request)[1]))
    for name in job["bad"]:
        try:
            send(llm, *adapters[name])
            found["errors"][name] = ""
        except Exception as error:
            # verl's receiver raises another error while it closes its shared memory.
            found["errors"][name] = f"{error!r} {error.__context__!r}"
    found["base after"] = ask(None)[0]
    found["opened"] = opened
    torch.save(found, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)
