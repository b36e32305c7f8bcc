"""Calls of an engine that dies, and replies of workers of which one ends."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

import pytest

from vllm_moe_lora.loading.replies import of_all_ranks
from vllm_moe_lora.loading.unanswered import end


def test_calls_that_wait_end():
    async def story():
        loop = asyncio.get_running_loop()
        waiting, cancelled, answered = loop.create_future(), loop.create_future(), Future()
        cancelled.cancel()
        answered.set_result("yes")
        blocked = Future()
        calls = dict(enumerate([waiting, cancelled, answered, blocked]))
        threading.Thread(target=end, args=(calls, RuntimeError("dead"))).start()
        with pytest.raises(RuntimeError, match="dead"):
            await asyncio.wait_for(waiting, 5)
        with pytest.raises(RuntimeError, match="dead"):
            blocked.result(5)
        assert answered.result() == "yes"
        assert cancelled.cancelled()

    asyncio.run(story())


def test_a_loop_that_is_closed_is_left_alone():
    loop = asyncio.new_event_loop()
    future = loop.create_future()
    loop.close()
    end({1: future}, RuntimeError("dead"))
    assert not future.done()


class Queue:
    """In place of vLLM's MessageQueue."""

    def __init__(self, reply):
        self.reply, self.ended = reply, False

    def dequeue(self, timeout=None):
        return self.reply

    def shutdown(self):
        self.ended = True


def test_replies_of_all_ranks_are_read_and_their_queues_can_be_ended():
    queues = [Queue("first"), Queue("second")]
    replies = of_all_ranks(queues)
    assert [one.dequeue(timeout=1) for one in replies] == ["first", "second"]
    for one in replies:  # as `MultiprocExecutor.shutdown` does when it sees a worker end
        one.shutdown()
    assert all(one.ended for one in queues)
