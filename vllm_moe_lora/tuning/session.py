"""One session of `vllm-moe-lora tune` on one layer shape: first right, then fast, then a record."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from vllm_moe_lora.kernels.triton import config
from vllm_moe_lora.records import Choice, Conditions, LayerShape, Record
from vllm_moe_lora.report import one_line
from vllm_moe_lora.tuning import cases, sides
from vllm_moe_lora.tuning.clock import Clock, Times
from vllm_moe_lora.tuning.numbers import Expected, wrong
from vllm_moe_lora.tuning.served import Served

CHECKED = (1, 3, 33, 257, 1025, 8192)  # tokens: below, at and above the limits of config.py
SEARCHED = (1, 32, 512)  # tokens of the batches by which tiles are chosen
MOST_REMARKS = 3  # on one layer's base GEMMs
CLOSE = 0.97  # another kind than upstream's must need less than this share of upstream's time

Checked = tuple[cases.Batch, Expected, str]  # a batch, what it must give, its name
Say = Callable[[str, float], None]  # (what is done, share of the session that is done)


@dataclass
class Session:
    """What is known of one layer shape so far.

    Attributes:
        shape, conditions: of the record.
        clock: times the kernels.
        say: is called after each step.
        on_gpu: False in Triton's interpreter: then upstream's kernels are left out.
        base: whether the layer has unquantised base weights, so that `tail` and vLLM's Triton GEMMs
            can run.
        served: vLLM's own layer, whose base GEMMs run with upstream's and our LoRA kernels; None to
            run these alone, or with ``base``.
        tailless: why `tail` cannot serve the layer if it is not ``base``.
        checked: tokens of the batches that are checked.
        sizes: tokens of the batches that are timed, the most important first.
        refused: kind -> why it must not serve this shape.
        remarks: what else the user should know.
        times: tokens -> kind -> times.
        tiles: the best tiles; () for those of config.py.
    """

    shape: LayerShape
    conditions: Conditions
    clock: Clock
    say: Say
    on_gpu: bool = True
    base: bool = False
    served: Served | None = None
    tailless: str = "it reads unquantised base weights, and here are none"
    checked: Sequence[int] = CHECKED
    sizes: Sequence[int] = ()
    refused: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    times: dict[int, Times] = field(default_factory=dict)
    tiles: tuple[config.Tiles, ...] = ()

    def __post_init__(self) -> None:
        self.device = "cuda" if self.on_gpu else "cpu"
        if not self.sizes:
            powers = [one for one in cases.CAPTURED if one & (one - 1) == 0]
            rest = [one for one in cases.CAPTURED if one not in powers]
            self.sizes = (*powers, *cases.LARGER, *rest)
        self.layer: Any = None
        self.experts = ""  # that run with the LoRA; "" for none, or vLLM's Triton GEMMs
        if self.served is not None:
            self.layer, self.base = self.served.layer, False
            self.experts = self.served.experts
        else:
            self.layer = cases.layer(self.shape, self.device, self.base)
        self.supported = True
        # As engines have them where ours win for all batches, and where upstream's win for some.
        self.factors: Any = None
        self.dense: Any = None
        try:
            self.factors, self.dense = sides.in_pages(self.layer), sides.factors_of(self.layer)
        except (TypeError, ValueError) as error:
            self.supported = False
            self.refused |= {"ours": str(error), "tail": str(error)}
        if not self.base:
            self.refused["tail"] = self.tailless

    @property
    def wrong(self) -> bool:
        """Whether kernels that support the layer gave a wrong number or failed."""
        kinds = {"ours", "tail"} if self.base else {"ours"}
        return self.supported and not kinds.isdisjoint(self.refused)

    def free(self) -> None:
        """Forget the layer, whose memory the next session needs."""
        self.layer = self.factors = self.dense = self.served = None

    def check(self) -> None:
        """Compare all kinds with fp32 on all kinds of batches. One wrong number refuses a kind."""
        total = len(self.checked) * len(cases.KINDS)
        for number, tokens in enumerate(self.checked):
            for index, kind in enumerate(cases.KINDS):
                self._check_batch(tokens, kind)
                done = (number * len(cases.KINDS) + index + 1) / total
                self.say(f"numbers of {tokens} tokens, adapters: {kind}", 0.3 * done)

    def _prepared(self, tokens: int, kind: str) -> Checked:
        """Make a batch, with what all kinds must return for it."""
        batch = cases.batch(self.shape, tokens, kind, self.device, seed=tokens)
        return batch, Expected(self.layer, batch), f"{tokens} tokens, adapters: {kind}"

    def _check_batch(self, tokens: int, kind: str) -> None:
        """Check all kinds on one batch."""
        if self.served is not None:
            self._check_served(self.served, tokens, kind)
        batch, expected, case = self._prepared(tokens, kind)
        if "ours" not in self.refused:
            self._check_ours(batch, expected, case)
        if "tail" not in self.refused:
            self._check_tail(batch, expected, case)
        if self.on_gpu and self.served is None:
            out = sides.Outputs.of(self.layer, batch)
            start = self._start(out, 1.0)
            call = sides.upstream(self.layer, batch, out)
            self._judge("upstream", call, out, expected, start, "add", case)

    def _check_served(self, served: Served, tokens: int, kind: str) -> None:
        """Check upstream's and our LoRA kernels in vLLM's own layer on one batch."""
        batch = cases.batch(self.shape, tokens, kind, self.device, seed=tokens)
        case = f"{tokens} tokens, adapters: {kind}, after {served.experts}"
        for side in ("upstream", "ours") if self.on_gpu else ("ours",):
            if side in self.refused:
                continue
            try:
                lora, base = served.judged(batch, self.factors if side == "ours" else None)
            except Exception as error:  # of any kind, see `_judge`
                lora, base = one_line(error)[:500], ""
            self._wrong(side, case, lora)
            said = sum(served.experts in one for one in self.remarks)
            if base and said < MOST_REMARKS:  # it is vLLM's part: no record can avoid it
                self.remarks.append(f"{case}, with {side}: {base}")

    def _check_ours(self, batch: cases.Batch, expected: Expected, case: str) -> None:
        for factors, how in ((self.factors, "store"), (self.dense, "store"), (self.factors, "add")):
            out = sides.Outputs.of(self.layer, batch)
            start = self._start(out, torch.nan if how == "store" else 1.0)
            call = sides.ours(self.layer, factors, batch, out, how == "add")
            self._judge("ours", call, out, expected, start, how, case)

    def _check_tail(self, batch: cases.Batch, expected: Expected, case: str) -> None:
        out = sides.Outputs.of(self.layer, batch)
        if self.on_gpu:
            _, order = sides.vllm_base(self.layer, batch, out)
        else:
            order = sides.plain_order(self.layer, batch)
        if config.base_tiles("", batch.x.dtype, order.block_m) is None:
            return  # vLLM's blocks have a size that ours have not: such a batch goes upstream
        for factors in (self.factors, self.dense):
            start = self._start(out, torch.nan)
            call = sides.tail(self.layer, factors, batch, out, order)
            self._judge("tail", call, out, expected, start, "base", case)

    def _start(self, out: sides.Outputs, value: float) -> list[torch.Tensor]:
        """Fill the outputs and return a copy of them."""
        for y in out.flat():
            y.fill_(value)
        return [y.clone() for y in out.flat()]

    def _judge(
        self,
        kind: str,
        call: sides.Call,
        out: sides.Outputs,
        expected: Expected,
        start: list[torch.Tensor],
        how: str,
        case: str,
    ) -> None:
        """Run a kind once; refuse it if a number is wrong or it fails."""
        try:
            call()
            found = wrong(out.flat(), expected, start, how)
        except Exception as error:  # of any kind: Triton's and the driver's are many
            found = one_line(error)[:500]
        self._wrong(kind, case, found)

    def _wrong(self, kind: str, case: str, found: str) -> None:
        """Note what was found wrong with a kind of kernels, if it is not ""."""
        if not found:
            return
        if kind == "upstream":  # it serves all the same, because nothing else may be left
            self.remarks.append(f"vLLM's own kernels, {case}: {found}")
        else:
            self.refused.setdefault(kind, f"{case}: {found}")

    def search(self, deadline: float) -> None:
        """Find the fastest tiles for shrink and expand.

        Tiles that fail to compile or give a wrong number are left out.

        Args:
            deadline: `time.monotonic()` at which to stop. What was found until then counts.
        """
        if "ours" in self.refused:
            return
        dtype = getattr(torch, self.shape.dtype)
        arch = self.conditions.arch
        checked = [self._prepared(tokens, "all") for tokens in (3, 257)]
        best: tuple[config.Tiles, ...] = ()
        best_us = self._score(best, checked)
        for part in range(2):
            space = config.search_space(arch, dtype, self.shape.rank)[part]
            for number, tiles in enumerate(space[1:]):
                if time.monotonic() > deadline:
                    break
                if part and best:  # the best shrink with another expand
                    tiles = _joined(best, tiles)
                us = self._score(tiles, checked)
                done = (part + (number + 1) / len(space)) / 2
                self.say(f"tiles: best {best_us:.1f} us, tried {us:.1f} us", 0.3 + 0.2 * done)
                if us < CLOSE * best_us:
                    best, best_us = tiles, us
        self.tiles = best
        self._use(best)

    def _use(self, tiles: tuple[config.Tiles, ...]) -> None:
        dtype = getattr(torch, self.shape.dtype)
        config.use(self.conditions.arch, dtype, self.shape.rank, tiles)

    def _score(self, tiles: tuple[config.Tiles, ...], checked: Sequence[Checked]) -> float:
        """Return the microseconds that `SEARCHED` batches need with ``tiles``; inf if they fail.

        Args:
            tiles: for `config.use`.
            checked: batches on which the numbers must be right.
        """
        self._use(tiles)
        refused = dict(self.refused)
        try:
            for one in checked:
                self._check_ours(*one)
            if self.refused != refused:
                return float("inf")
            total = 0.0
            for tokens in SEARCHED if self.on_gpu else (1,):
                batch = cases.batch(self.shape, tokens, "all", self.device)
                out = sides.Outputs.of(self.layer, batch)
                call = sides.ours(self.layer, self.factors, batch, out)
                what = f"{tokens} {[tuple(asdict(one).values()) for one in tiles]}"
                total += self.clock.time({"ours": call}, what)["ours"][0]
            return total
        except Exception:  # too much shared memory, for example
            return float("inf")
        finally:
            self.refused = refused

    def measure(self, deadline: float) -> None:
        """Time all kinds at each size.

        Args:
            deadline: `time.monotonic()` at which to stop. At least one size is timed.
        """
        for number, tokens in enumerate(self.sizes):
            if self.times and time.monotonic() > deadline:
                self.remarks.append(f"time was up after {number} of {len(self.sizes)} sizes")
                break
            self.times[tokens] = self.clock.time(self._calls(tokens), str(tokens))
            kinds = ", ".join(f"{kind} {us[0]:.1f} us" for kind, us in self.times[tokens].items())
            self.say(f"{tokens} tokens: {kinds}", 0.5 + 0.5 * (number + 1) / len(self.sizes))

    def _calls(self, tokens: int) -> dict[str, sides.Call]:
        """Return the kinds that may serve a batch of ``tokens`` tokens, all of them with LoRA."""
        batch = cases.batch(self.shape, tokens, "all", self.device)
        calls: dict[str, sides.Call] = {}
        if self.served is not None:
            calls["upstream"] = self.served.call(batch, None) if self.on_gpu else lambda: None
            if "ours" not in self.refused:
                calls["ours"] = self.served.call(batch, self.factors)
            return calls
        out = sides.Outputs.of(self.layer, batch)
        first: sides.Call | None = None
        order = None
        if self.base:
            if self.on_gpu:
                first, order = sides.vllm_base(self.layer, batch, out)
            else:
                order = sides.plain_order(self.layer, batch)
        if self.on_gpu:
            calls["upstream"] = sides.upstream(self.layer, batch, out)
        else:
            calls["upstream"] = lambda: None  # upstream's kernels do not run in the interpreter
        if "ours" not in self.refused:
            calls["ours"] = sides.ours(self.layer, self.factors, batch, out)
        if first is not None:
            calls = {kind: sides.after(first, call) for kind, call in calls.items()}
        if order is not None and "tail" not in self.refused:
            tiles = config.base_tiles("", batch.x.dtype, order.block_m)
            if tiles is not None:
                calls["tail"] = sides.tail(self.layer, self.factors, batch, out, order)
        return calls

    def record(self) -> Record | None:
        """Return what was measured so far; None if nothing was."""
        if not self.times:
            return None
        choices = tuple(
            Choice(tokens, _winner(self.times[tokens]), self.times[tokens])
            for tokens in sorted(self.times)
        )
        tiles = tuple(tuple(asdict(one).values()) for one in self.tiles)
        base = (self.base and self.on_gpu) or bool(self.experts)
        return Record(self.conditions, self.shape, choices, tiles, dict(self.refused), base)


def _winner(times: Times) -> str:
    """Return the fastest kind; upstream's unless another one is clearly faster."""
    upstream = times["upstream"]
    best = min(times, key=lambda kind: times[kind][0])
    clear = times[best][0] < CLOSE * upstream[0] and times[best][0] < upstream[1]
    return best if clear else "upstream"


def _joined(
    shrink: tuple[config.Tiles, ...], expand: tuple[config.Tiles, ...]
) -> tuple[config.Tiles, ...]:
    """Return the tiles of ``shrink`` with the options that ``expand`` has for the expand kernel."""
    return tuple(
        replace(one, block_n=other.block_n, expand_warps=other.expand_warps)
        for one, other in zip(shrink, expand, strict=True)
    )
