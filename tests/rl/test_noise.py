"""AQN's schedule and draw; the rest is in tests/e2e/rl/test_noise_engine.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vllm_moe_lora.rl import noise


def _qerl(step, total, start, end, stages):
    """QeRL's table of stages by its description: K - 1 falling values, none in the first stage."""
    values = [start]
    for _ in range(stages - 2):
        values.append(values[-1] * (end / start) ** (1 / (stages - 2)))
    length = total / stages
    stage = 0
    while stage + 1 < stages and step >= (stage + 1) * length:
        stage += 1
    return 0.0 if stage == 0 else values[stage - 1]


@pytest.mark.parametrize(
    ("total", "start", "end", "stages"),
    [(100, 5e-2, 5e-4, 10), (200, 1e-2, 1e-4, 10), (60, 5e-2, 5e-4, 3), (7, 1e-2, 1e-4, 5)],
)
def test_schedule(total, start, end, stages):
    for step in range(total + 5):
        want = _qerl(step, total, start, end, stages)
        assert noise.sigma(step, total, start, end, stages) == pytest.approx(want, rel=1e-9)
    assert noise.sigma(0, total, start, end, stages) == 0
    assert noise.sigma(total, total, start, end, stages) == pytest.approx(end)


# NVlabs/QeRL's get_sigma_by_step and the trend of its grpo_trainer.py gave these for 33 steps.
TABLE = [0.0] * 4 + [5e-2] * 3 + [0.028117066259517453] * 3 + [0.015811388300841896] * 4


def test_the_first_steps_are_qerls():
    for step, want in enumerate(TABLE):
        assert noise.sigma(step, 33) == pytest.approx(want, rel=1e-12)


def test_draw():
    name = "model.layers.3.input_layernorm"
    one = noise.draw(0, 12, name, 20000, 0.01)
    assert one.dtype == torch.float32
    assert abs(one.std().item() - 0.01) < 0.0005
    assert abs(one.mean().item()) < 0.0005
    assert torch.equal(one, noise.draw(0, 12, name, 20000, 0.01))
    for other in ((1, 12, name), (0, 13, name), (0, 12, name.replace("3", "4"))):
        assert (noise.draw(*other, 20000, 0.01) - one).abs().mean() > 0.005
    code = (
        f"from vllm_moe_lora.rl import noise; print(noise.draw(0, 12, {name!r}, 5, 0.01).tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(noise.draw(0, 12, name, 5, 0.01).tolist()), "another process"


@pytest.mark.parametrize(
    "wrong", [{"step": -1}, {"total": 0}, {"stages": 2}, {"start": 0.0}, {"end": -1.0}]
)
def test_refused(wrong):
    with pytest.raises(ValueError, match="noise: step"):
        noise.sigma(**{"step": 1, "total": 10, **wrong})
