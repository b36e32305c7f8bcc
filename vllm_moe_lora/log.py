"""Loggers under "vllm.", the only names vLLM gives a handler."""

from __future__ import annotations

import functools
import logging

ROOT = "vllm.moe_lora"
_waiting: list[str] = []


def get_logger(name: str = "") -> logging.Logger:
    """The logger of one of our modules: "vllm.moe_lora.<module path below the package>"."""
    tail = name.removeprefix(__package__).strip(".")
    return logging.getLogger(f"{ROOT}.{tail}" if tail else ROOT)


@functools.cache
def warning_once(message: str) -> None:
    """Log a warning once a process; the message carries the cure."""
    get_logger().warning("%s", message)


def info_when_heard(message: str) -> None:
    """Log at INFO, or keep it for `say_waiting` as long as nobody listens.

    vLLM 0.32 gives its loggers a handler after plugins were loaded.
    """
    _waiting.append(message)
    if get_logger().isEnabledFor(logging.INFO) and get_logger().hasHandlers():
        say_waiting()


def say_waiting() -> None:
    """Log what waits to be heard, once."""
    while _waiting:
        get_logger().info("%s", _waiting.pop(0))
