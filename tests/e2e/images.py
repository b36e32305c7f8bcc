"""Child side of test_images.py: an engine with a vision tower, whose requests have images."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


def picture(seed: int):
    """A random image of 56 x 56 pixels."""
    from PIL import Image

    numbers = torch.randint(0, 256, (56, 56, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(numbers.to(torch.uint8).numpy())


def media(seed: int, chunks: bool | None):
    """An image as a request has it; ``chunks``: as those of Kimi K2.5 do."""
    image = picture(seed)
    if not chunks:
        return {"image": image}
    return {"vision_chunk": [{"type": "image", "image": image, "uuid": None}]}


def main(spec: str, result: str) -> None:
    job = json.loads(Path(spec).read_text())
    import transformers.models.auto.image_processing_auto as auto
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    import vllm_moe_lora  # noqa: F401

    auto.is_torchvision_available = lambda: False  # what is here is a stub

    llm = LLM(
        job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_logprobs=512,
        enable_lora=True,
        max_loras=3,
        max_lora_rank=16,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        **{"limit_mm_per_prompt": {"image": 1}, "max_num_seqs": 4, **job["options"]},
    )
    adapters = {
        name: LoRARequest(name, number, path)
        for number, (name, path) in enumerate(job["adapters"].items(), start=1)
    }
    sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=512, detokenize=False)
    answers, outcomes = [], []
    for requests in job["rounds"]:
        prompts = [
            {"prompt_token_ids": tokens}
            | ({} if seed is None else {"multi_modal_data": media(seed, job.get("chunks"))})
            for tokens, seed, _ in requests
        ]
        named = [adapters.get(name) for _, _, name in requests]
        outputs = llm.generate(prompts, sampling, lora_request=named, use_tqdm=False)
        found = torch.full((len(outputs), 512), float("-inf"))
        for row, output in zip(found, outputs, strict=True):
            for token, logprob in output.outputs[0].logprobs[0].items():
                row[token] = logprob.logprob
        answers.append(found)
    for name in job["load"]:
        try:
            llm.llm_engine.add_lora(adapters[name])
            outcomes.append("ok")
        except Exception as error:  # any error is an outcome
            outcomes.append(f"{type(error).__name__}: {error}")
    torch.save((answers, outcomes), result)


if __name__ == "__main__":
    main(*sys.argv[1:])
