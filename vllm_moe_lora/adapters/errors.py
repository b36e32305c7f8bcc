"""The error for an adapter that cannot be used, and helpers to word it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

SHOWN = 10


class AdapterError(ValueError):
    """An adapter is damaged, incomplete or for another model.

    The message names the tensor or module, and what the user can do.
    """


def listed(names: Iterable[str]) -> str:
    """The first ten names in sorted order, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def rank_text(tensor: str, rank: int, limit: int) -> str:
    """The message for a tensor whose rank is above the engine's ``max_lora_rank`` (``limit``)."""
    return (
        f"{tensor} has rank {rank}, above max_lora_rank={limit}. Start the engine with "
        f"--max-lora-rank {rank} or higher."
    )


def message_prefix(lora_id: int) -> str:
    """The beginning of every message about an adapter that an engine was asked to load.

    The worker raises the error and the engine's front end receives it inside other text. The front
    end finds our message by this prefix (`loading/front_end.py`).
    """
    return f"LoRA adapter {lora_id}: "


@contextmanager
def prefixed(lora_id: int) -> Iterator[None]:
    """Put `message_prefix` before the text of an `AdapterError` that leaves the block.

    A message that already has the prefix is left as it is, so blocks may be nested.
    """
    try:
        yield
    except AdapterError as error:
        if str(error).startswith(message_prefix(lora_id)):
            raise
        raise AdapterError(message_prefix(lora_id) + str(error)) from error
