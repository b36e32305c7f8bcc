"""The plugin's loggers.

Their names start with "vllm.", because vLLM gives a handler only to loggers with such names.
"""

from __future__ import annotations

import functools
import logging

ROOT = "vllm.moe_lora"
_deferred: list[str] = []  # messages that nobody could read yet


def get_logger(name: str = "") -> logging.Logger:
    """Return the logger "vllm.moe_lora.<path>" of one of our modules.

    Args:
        name: the module's ``__name__``; <path> is what follows the package's name in it.
    """
    path = name.removeprefix(__package__).strip(".")
    return logging.getLogger(f"{ROOT}.{path}" if path else ROOT)


@functools.cache
def warning_once(message: str) -> None:
    """Log a warning once per process. The message has to say what the user can do."""
    get_logger().warning("%s", message)


def info_deferred(message: str) -> None:
    """Log at INFO level. If no handler would print it, keep it for `flush_deferred`.

    vLLM 0.32 loads its plugins before it gives its loggers a handler, so a message that the
    plugin logs while it is loaded would be lost.
    """
    _deferred.append(message)
    if get_logger().isEnabledFor(logging.INFO) and get_logger().hasHandlers():
        flush_deferred()


def flush_deferred() -> None:
    """Log the messages that `info_deferred` kept, and forget them."""
    while _deferred:
        get_logger().info("%s", _deferred.pop(0))
