"""Loggers under "vllm.", the only names vLLM gives a handler."""

from __future__ import annotations

import functools
import logging

ROOT = "vllm.moe_lora"


def get_logger(name: str = "") -> logging.Logger:
    """The logger of one of our modules: "vllm.moe_lora.<module path below the package>"."""
    tail = name.removeprefix(__package__).strip(".")
    return logging.getLogger(f"{ROOT}.{tail}" if tail else ROOT)


@functools.cache
def warning_once(message: str) -> None:
    """Log a warning once a process; the message carries the cure."""
    get_logger().warning("%s", message)
