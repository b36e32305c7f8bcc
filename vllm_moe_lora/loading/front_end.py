"""What an engine's front end remembers of adapters, so that a bad one never reaches a batch.

Upstream loads an adapter where its first request is scheduled: an error there takes the batch, and
the engine, with it. Here the front end asks for the load before it passes the request on, so that
the caller gets the error and nobody else notices. What the workers hold is decided here too: an
adapter with requests in flight is never the one that makes room for another.
"""

from __future__ import annotations

import asyncio
import copy
import re
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any

from ..adapters import folder
from ..adapters.errors import AdapterError


@dataclass
class Version:
    """One state of one adapter: ``path`` is unlike any other version's, ``files`` as first read."""

    path: str
    files: tuple[Any, ...] | None
    ready: bool = False


class Known:
    """What the workers hold (at most ``capacity`` adapters, max_cpu_loras), oldest use first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held: OrderedDict[int, Version] = OrderedDict()
        self._last: dict[tuple[str, str], Version] = {}  # by name and path, held or not
        self._revisions: Counter[tuple[str, str]] = Counter()
        self.locks: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.entering: Counter[int] = Counter()  # let through, and not yet among the engine's own

    def has(self, request: Any) -> bool:
        """Whether no load is needed; the adapter counts as used.

        A request with load_inplace needs one if the files are not those that were read.
        """
        held = self._held.get(request.lora_int_id)
        if held is None or not held.ready:
            return False
        self._held.move_to_end(request.lora_int_id)
        if not request.load_inplace:
            return True
        return held.files is not None and held.files == folder.state(_plain(request))

    def replaces(self, number: int) -> bool:
        return number in self._held and self._held[number].ready

    def full(self, number: int) -> bool:
        """Whether room has to be made for adapter ``number``."""
        return number not in self._held and len(self._held) >= self._capacity

    def idle(self, in_flight: Counter[int]) -> int | None:
        """The adapter that was used longest ago, of those that nobody uses."""
        ids = (i for i, held in self._held.items() if held.ready and not in_flight[i])
        return next(ids, None)

    def make_room(self, number: int, in_flight: Counter[int]) -> int | None:
        """Forget an idle adapter if ``number`` needs its place; the workers are to do so too."""
        gone = self.idle(in_flight) if self.full(number) else None
        if gone is not None:
            del self._held[gone]
        return gone

    def begin(self, request: Any) -> tuple[Any, Version]:
        """A copy of ``request`` to load by; the place is taken until `done` or `failed`.

        A version gets a spelling of its path that no other one of that name had, because cached
        prefixes are found by name and path.
        """
        files, key = folder.state(_plain(request)), (request.lora_name, _plain(request))
        path, last = request.lora_path, self._last.get(key)
        if last is not None:
            path = last.path
            if last.files != files or (files is None and request.load_inplace):
                from vllm.lora.utils import get_adapter_absolute_path

                self._revisions[key] += 1
                path = get_adapter_absolute_path(_plain(request)) + "/." * self._revisions[key]
        version = Version(path, files)
        self._held.setdefault(request.lora_int_id, version)
        asked = copy.copy(request)
        asked.lora_path = path
        return asked, version

    def done(self, request: Any, version: Version) -> None:
        version.ready = True
        number = request.lora_int_id
        self._held[number] = self._last[request.lora_name, _plain(request)] = version
        self._held.move_to_end(number)
        while len(self._held) > self._capacity:  # no idle one: the workers take the oldest
            self._held.popitem(last=False)

    def failed(self, request: Any, version: Version) -> None:
        """An earlier version, if there is one, stays."""
        if self._held.get(request.lora_int_id) is version:
            del self._held[request.lora_int_id]

    def forget(self, number: int) -> None:
        self._held.pop(number, None)

    def now(self, request: Any) -> Any:
        """A copy of ``request`` for the scheduler: the version held, which is not loaded again."""
        found = copy.copy(request)
        found.load_inplace = False
        held = self._held.get(request.lora_int_id)
        if held is not None:
            found.lora_path = held.path
        return found


def _plain(request: Any) -> str:
    return re.sub(r"(/\.)+$", "", request.lora_path)


def of(engine: Any) -> Known | None:
    """The one `Known` of an `AsyncLLM` or `LLMEngine`; None without LoRA or without experts."""
    if engine.vllm_config.lora_config is None or not engine.model_config.is_moe:
        return None
    if not hasattr(engine, "moe_lora_known"):
        engine.moe_lora_known = Known(engine.vllm_config.lora_config.max_cpu_loras)
    found: Known = engine.moe_lora_known
    return found


def in_flight(engine: Any) -> Counter[int]:
    """Adapter id -> unfinished requests, of an `AsyncLLM` or `LLMEngine`."""
    found = Counter(engine.moe_lora_known.entering)
    for state in engine.output_processor.request_states.values():
        if state.lora_request is not None:
            found[state.lora_request.lora_int_id] += 1
    return found


def lora_request_of(args: tuple[Any, ...], more: dict[str, Any]) -> Any:
    """The LoRARequest among the arguments of `add_request` (without self), or None."""
    given = more.get("lora_request", args[4] if len(args) > 4 else None)
    return given or getattr(_prompt_of(args, more), "lora_request", None)


def _prompt_of(args: tuple[Any, ...], more: dict[str, Any]) -> Any:
    return more.get("prompt", args[1] if len(args) > 1 else None)


def with_lora_request(
    request: Any, args: tuple[Any, ...], more: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `add_request` with ``request`` where they had one."""
    prompt = _prompt_of(args, more)
    if getattr(prompt, "lora_request", None):
        prompt.lora_request = request
    if len(args) > 4 and args[4]:
        args = (*args[:4], request, *args[5:])
    elif more.get("lora_request"):
        more = {**more, "lora_request": request}
    return args, more


def plainly(error: BaseException, asked: Any, request: Any) -> BaseException:
    """The sentence of an `AdapterError` out of what vLLM's processes wrapped around it.

    Args:
        error: of a load by ``asked``, which is ``request`` under its version's path.
    """
    text = str(error).replace(asked.lora_path, request.lora_path)
    found = re.search(r"LoRA adapter \d+: .*", text, re.DOTALL)
    if isinstance(error, AdapterError):
        return error
    if found is not None:
        return AdapterError(re.sub(r"['\"], please check.*$", "", found[0], flags=re.DOTALL))
    if text != str(error):
        error.args = (text,)
    return error
