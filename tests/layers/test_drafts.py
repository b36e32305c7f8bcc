"""Values of requests, expanded to their tokens."""

from __future__ import annotations

import pytest
import torch

from vllm_moe_lora.layers.drafts import expand_batch_to_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_each_token_gets_the_value_of_its_request(dtype):
    x, ends = torch.tensor([3, 0, 7, 5], dtype=dtype), torch.tensor([2, 3, 3, 6], dtype=torch.int32)
    found = expand_batch_to_tokens(x, ends, 6, replace_from=0, replace_to=1)
    assert found.dtype == dtype
    assert found.tolist() == [3, 3, 1, 5, 5, 5]
    assert expand_batch_to_tokens(x, ends, 6).tolist() == [3, 3, 0, 5, 5, 5]
    assert x.tolist() == [3, 0, 7, 5]
