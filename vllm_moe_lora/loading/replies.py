"""Reads the replies of all ranks to a call, before one of them is raised as an error.

vLLM raises the first rank's error and leaves the other ranks' replies in their queues. The next
call would get them: after a refused adapter, calls would fail or get each other's results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WORKER_ENDED = "A worker process of this engine has ended, so the engine ends."


class _Reply:
    """In place of one rank's queue of replies."""

    def __init__(self, queues: Sequence[Any], read: list[Any], rank: int) -> None:
        self._queues, self._read, self._rank = queues, read, rank

    def dequeue(self, timeout: float | None = None) -> Any:
        """This rank's reply. The first call takes one reply of each rank."""
        if not self._read:
            self._read.extend(queue.dequeue(timeout=timeout) for queue in self._queues)
        return self._read[self._rank]

    def shutdown(self) -> None:
        """vLLM's thread that sees a worker die ends the queues, while another one reads them."""
        self._queues[self._rank].shutdown()


def of_all_ranks(queues: Sequence[Any]) -> list[_Reply]:
    """Stand-ins for ``queues``, vLLM's `MessageQueue` of each rank, for one call."""
    read: list[Any] = []
    return [_Reply(queues, read, rank) for rank in range(len(queues))]
