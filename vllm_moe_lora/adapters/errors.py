"""Why an adapter cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

SHOWN = 10


class AdapterError(ValueError):
    """An adapter is damaged, incomplete or for another model; the text names tensor and cure."""


def listed(names: Iterable[str]) -> str:
    """The first ten names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def rank_text(tensor: str, rank: int, limit: int) -> str:
    """A rank above what the engine was started for."""
    return (
        f"{tensor} has rank {rank}, above max_lora_rank={limit}. Start the engine with "
        f"--max-lora-rank {rank} or higher."
    )


def head(number: int) -> str:
    """How messages about an adapter of an engine begin; the front end looks for it."""
    return f"LoRA adapter {number}: "


@contextmanager
def about(number: int) -> Iterator[None]:
    """Put `head` before the text of an `AdapterError` that leaves the block, once."""
    try:
        yield
    except AdapterError as error:
        if str(error).startswith(head(number)):
            raise
        raise AdapterError(head(number) + str(error)) from error
