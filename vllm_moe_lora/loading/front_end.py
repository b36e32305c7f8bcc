"""What the engine's front end knows about adapters, so that a bad one never reaches a batch.

vLLM loads an adapter when its first request is scheduled. An error at that point ends the whole
batch, and the engine with it. Here the front end has the adapter loaded before it passes the
request on, so the caller gets the error and no other request is affected.

The front end (`AsyncLLM`, or `LLMEngine` offline) also decides which adapters the workers hold. An
adapter with requests in flight is not removed to make room for another.
"""

from __future__ import annotations

import asyncio
import copy
import os
import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..adapters import folder
from ..adapters.errors import AdapterError, message_prefix
from ..targets.target_modules import may_target_experts
from . import memory
from .replies import WORKER_ENDED
from .slots import GroupSlots

MAX_ID = 2**63 - 1  # vLLM keeps the ids of a batch as int64


@dataclass
class Version:
    """One version of an adapter, which is one state of its files.

    Attributes:
        path: a spelling of the adapter's path that no other version has. vLLM finds cached prefixes
            by an adapter's name and path, so those of another version are not found.
        files: `files_state` when the load began; None if there is no such local folder.
        ready: the load is done.
    """

    path: str
    files: tuple[Any, ...] | None
    ready: bool = False


class HeldAdapters:
    """The adapters that the workers hold in CPU memory, and those that are being loaded.

    Args:
        capacity: how many the workers can hold (max_cpu_loras).
        slots: how many can be in one batch (max_loras).
        shared: whether several front ends use the engine, each with a `HeldAdapters` of its own.
        group: whether the engine is a data-parallel group, and adapters may target routed experts.

    Attributes:
        locks: one per adapter id. A caller holds it while it checks and loads the adapter.
        pushing: one per adapter id. Pushes of an adapter are done one by one, in their order.
        entering: adapter id -> requests that have passed the check, but that the engine does not
            have in its own list yet.
        claims: adapter id -> requests and calls that are about to use it.
        slots: which adapter is in which slot of a data-parallel group; None without one.
    """

    def __init__(
        self, capacity: int, slots: int, shared: bool = False, group: bool = False
    ) -> None:
        self._capacity, self._slots = capacity, slots
        self._held: OrderedDict[int, Version] = OrderedDict()  # by id, least recently used first
        # By name and path: the version that was loaded last, even if it is not held any more, and
        # how many spellings of the path were used.
        self._last: dict[tuple[str, str], Version] = {}
        self._spellings: Counter[tuple[str, str]] = Counter()
        self._names: dict[int, tuple[str, str]] = {}  # by id: name and path, while it is held
        self.pinned: set[int] = set()
        self.locks: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.pushing: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.entering: Counter[int] = Counter()
        self.claims: Counter[int] = Counter()
        self.shared = shared
        self.slots = GroupSlots(slots, fixed=shared) if group else None

    @contextmanager
    def claimed(self, lora_id: int) -> Iterator[None]:
        """Keep the adapter from being dropped for another one inside the block."""
        self.claims[lora_id] += 1
        try:
            yield
        finally:
            self.claims[lora_id] -= 1

    def check(self, request: Any) -> None:
        """Refuse a LoRARequest with which no engine can do the right thing.

        Raises:
            AdapterError: the id is no id, it belongs to another adapter, every slot has a pinned
                adapter, or an adapter is replaced that other front ends use.
        """
        self.check_alone(request.lora_int_id, request.load_inplace, "load_inplace")
        lora_id = request.lora_int_id
        if type(lora_id) is not int or not 0 < lora_id <= MAX_ID:
            raise AdapterError(
                f"LoRA adapter {lora_id!r}: lora_int_id of {request.lora_name!r} must be a whole "
                f"number from 1 to {MAX_ID}."
            )
        path, held = _plain(request), self._names.get(lora_id)
        if held is not None and lora_id in self._held and not request.load_inplace:
            name, other = held
            if os.path.realpath(other) != os.path.realpath(path):
                raise AdapterError(
                    f"LoRA adapter {lora_id}: this id belongs to {name!r} from {other}, so "
                    f"{request.lora_name!r} from {path} would be answered with its weights. Give "
                    "each adapter an id of its own, remove the first, or load with load_inplace."
                )
        if lora_id not in self.pinned and len(self.pinned) >= self._slots:
            raise AdapterError(
                f"LoRA adapter {lora_id}: all {self._slots} slots hold pinned adapters. Raise "
                "--max-loras, or remove one of them."
            )

    def check_alone(self, lora_id: int, changes: bool, what: str) -> None:
        """Refuse a change of an adapter that other front ends may be using.

        Raises:
            AdapterError: ``changes`` is true, and there are several front ends.
        """
        if changes and self.shared:
            raise AdapterError(
                f"LoRA adapter {lora_id}: {what} would change an adapter that other API servers of "
                "this engine may be using. Start with --api-server-count 1."
            )

    def is_loaded(self, request: Any) -> bool:
        """Whether the adapter of a LoRARequest can be used without a load.

        With load_inplace it needs a load if its files have changed since they were read. The
        adapter counts as just used.
        """
        held = self._held.get(request.lora_int_id)
        if held is None or not held.ready:
            return False
        self._held.move_to_end(request.lora_int_id)
        if not request.load_inplace:
            return True
        return held.files is not None and held.files == folder.files_state(_plain(request))

    def replaces(self, lora_id: int) -> bool:
        """Whether loading the adapter replaces a version that is held."""
        return lora_id in self._held and self._held[lora_id].ready

    def needs_room(self, lora_id: int) -> bool:
        """Whether another adapter has to be removed before this one can be loaded."""
        return lora_id not in self._held and len(self._held) >= self._capacity

    def idle(self, in_flight: Counter[int], but: int | None = None) -> int | None:
        """The least recently used of the adapters that no request uses and nobody has pinned.

        None if there is none.

        Args:
            in_flight: adapter id -> number of unfinished requests, from `in_flight`.
            but: an adapter that is not meant.
        """
        ids = (i for i in self._unpinned() if self._held[i].ready and not in_flight[i])
        return next((i for i in ids if i != but), None)

    def _unpinned(self) -> Iterator[int]:
        return (lora_id for lora_id in self._held if lora_id not in self.pinned)

    def make_room(self, lora_id: int, in_flight: Counter[int]) -> int | None:
        """Forget an idle adapter if that is needed to load this one.

        Returns:
            The id of the forgotten adapter, which the caller has to remove from the workers; None
            if there is room, or no adapter is idle.
        """
        return self.drop_idle(lora_id, in_flight) if self.needs_room(lora_id) else None

    def drop_idle(self, lora_id: int, in_flight: Counter[int]) -> int | None:
        """Forget an idle adapter other than this one; see `make_room` for what is returned."""
        dropped = self.idle(in_flight, but=lora_id)
        if dropped is not None:
            del self._held[dropped]
        return dropped

    def begin(self, request: Any) -> tuple[Any, Version]:
        """Begin a load. It takes one place of the capacity until `done` or `failed` is called.

        Returns:
            A copy of ``request`` with the path of the version, and the version. If the files are
            as they were at the last load, the version has the path that it had then, so that cached
            prefixes are found again.
        """
        files, key = folder.files_state(_plain(request)), (request.lora_name, _plain(request))
        path, last = request.lora_path, self._last.get(key)
        # The path of a pushed adapter has the name of its segment, so it is new in any case.
        if last is not None and not memory.is_memory(path):
            path = last.path
            if last.files != files or (files is None and request.load_inplace):
                from vllm.lora.utils import get_adapter_absolute_path

                # "/." at the end of a path changes its spelling, but not the folder.
                self._spellings[key] += 1
                path = get_adapter_absolute_path(_plain(request)) + "/." * self._spellings[key]
        version = Version(path, files)
        self._held.setdefault(request.lora_int_id, version)
        versioned = copy.copy(request)
        versioned.lora_path = path
        return versioned, version

    def done(self, request: Any, version: Version) -> None:
        """End a load that succeeded."""
        version.ready = True
        lora_id = request.lora_int_id
        self._names[lora_id] = request.lora_name, _plain(request)
        self._held[lora_id] = self._last[request.lora_name, _plain(request)] = version
        self._held.move_to_end(lora_id)
        # More than fit are held if no adapter was idle. The workers drop the least recently used.
        while len(self._held) > self._capacity:
            del self._held[next(self._unpinned())]

    def failed(self, request: Any, version: Version) -> None:
        """End a load that failed. If there is an earlier version, it stays."""
        if self._held.get(request.lora_int_id) is version:
            del self._held[request.lora_int_id]

    def forget(self, lora_id: int) -> None:
        """Forget an adapter that was removed from the workers."""
        self._held.pop(lora_id, None)
        self._names.pop(lora_id, None)
        self.pinned.discard(lora_id)

    def request_of(self, lora_id: int) -> Any:
        """A LoRARequest for an adapter that is held, with the path of its version; or None."""
        if not self.replaces(lora_id):
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(self._names[lora_id][0], lora_id, self._held[lora_id].path)

    def for_scheduler(self, request: Any) -> Any:
        """A copy of ``request`` for the scheduler, with the path of the version that is held.

        It has no load_inplace, so that vLLM does not load the adapter again.
        """
        found = copy.copy(request)
        found.load_inplace = False
        held = self._held.get(request.lora_int_id)
        if held is not None:
            found.lora_path = held.path
        return found


def _plain(request: Any) -> str:
    """The request's path without what says which version it is."""
    return re.sub(r"(/\.)+$", "", memory.without_segment(request.lora_path))


def held_adapters(engine: Any) -> HeldAdapters | None:
    """The `HeldAdapters` of an `AsyncLLM` or `LLMEngine`.

    None if the engine has no LoRA or its model has no routed experts. vLLM's code then runs
    unchanged.
    """
    if engine.vllm_config.lora_config is None or not engine.model_config.is_moe:
        return None
    if not hasattr(engine, "moe_lora_held"):
        config = engine.vllm_config.lora_config
        ranks = engine.vllm_config.parallel_config.data_parallel_size
        engine.moe_lora_held = HeldAdapters(
            config.max_cpu_loras,
            config.max_loras,
            shared=getattr(engine, "_client_count", 1) > 1,
            group=ranks > 1 and may_target_experts(engine.vllm_config),
        )
    found: HeldAdapters = engine.moe_lora_held
    return found


def in_flight(engine: Any) -> Counter[int]:
    """Adapter id -> number of unfinished requests of an `AsyncLLM` or `LLMEngine`."""
    found = Counter(engine.moe_lora_held.entering)
    for state in engine.output_processor.request_states.values():
        if state.lora_request is not None:
            found[state.lora_request.lora_int_id] += 1
    return found


def users(engine: Any, lora_id: int) -> list[str]:
    """The engine's own ids of unfinished requests that use an adapter."""
    states = engine.output_processor.request_states.items()
    return [
        number
        for number, state in states
        if state.lora_request is not None and state.lora_request.lora_int_id == lora_id
    ]


def busy(engine: Any) -> Counter[int]:
    """Adapter id -> number of unfinished requests, and of calls that are about to use it."""
    return in_flight(engine) + engine.moe_lora_held.claims


def lora_request_of(args: tuple[Any, ...], more: dict[str, Any]) -> Any:
    """The LoRARequest among the arguments of vLLM's `add_request`, or None.

    It is the argument ``lora_request``, or an attribute of the prompt.

    Args:
        args: positional arguments without self.
        more: keyword arguments.
    """
    given = more.get("lora_request", args[4] if len(args) > 4 else None)
    return given or getattr(_prompt_of(args, more), "lora_request", None)


def _prompt_of(args: tuple[Any, ...], more: dict[str, Any]) -> Any:
    return more.get("prompt", args[1] if len(args) > 1 else None)


def with_lora_request(
    request: Any, args: tuple[Any, ...], more: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `add_request` with ``request`` in place of the LoRARequest they had."""
    prompt = _prompt_of(args, more)
    if getattr(prompt, "lora_request", None):
        prompt.lora_request = request
    if len(args) > 4 and args[4]:
        args = (*args[:4], request, *args[5:])
    elif more.get("lora_request"):
        more = {**more, "lora_request": request}
    return args, more


def unwrapped_error(error: BaseException, versioned: Any, request: Any) -> BaseException:
    """The error to raise to the caller for a load that failed in a worker.

    vLLM's processes raise a new error whose text contains ours. Our message is found in it by
    `errors.message_prefix`.

    Args:
        error: what the load raised.
        versioned: the LoRARequest that was loaded, with the path of its version.
        request: the caller's LoRARequest.

    Returns:
        An `AdapterError` if that was the cause, vLLM's `EngineDeadError` if a worker ended, else
        ``error``, which names the caller's path.
    """
    text = str(error).replace(versioned.lora_path, request.lora_path)
    found = re.search(r"LoRA adapter \d+: .*", text, re.DOTALL)
    if isinstance(error, AdapterError):
        return error
    if WORKER_ENDED in text:
        from vllm.v1.engine.exceptions import EngineDeadError

        return EngineDeadError()
    if found is not None:
        return AdapterError(re.sub(r"['\"], please check.*$", "", found[0], flags=re.DOTALL))
    if text != str(error):
        error.args = (text,)
    return error


@contextmanager
def refused_requests(request: Any) -> Iterator[None]:
    """Raise an adapter's refusal inside the block as an error of the client's.

    `AsyncLLM.generate` and `encode` pass those on. All others become an `EngineGenerateError`
    without text.

    Args:
        request: the LoRARequest.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        if "No adapter found for" in text and not isinstance(error, AdapterError):
            text = message_prefix(request.lora_int_id) + (
                f"{request.lora_name!r} is not in memory, and there is no adapter any more in "
                f"{_plain(request)}."
            )
        elif not isinstance(error, AdapterError):
            raise
        raise _refused_request()(text) from error


@cache
def _refused_request() -> type[Exception]:
    from vllm.exceptions import VLLMClientError

    return type("RefusedAdapter", (AdapterError, VLLMClientError), {})
