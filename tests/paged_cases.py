"""Puts the factors of a kernel test's case into pages, in an arena that others have fragmented."""

from __future__ import annotations

import dataclasses
import random

import lora_cases as cases

from vllm_moe_lora.kernels.paged_stack import Arena, pages_for


def paged(case: cases.Case, seed: int, device: str = "cpu") -> cases.Case:
    """The same case with `PagedStack`s, of an arena with pages for nothing else.

    All slots are written, in some order, some more than once. What no page of theirs has is NaN.
    """
    order = random.Random(seed)
    slots = case.ranks.shape[1]
    ranks = [int(case.ranks[:, slot].max()) for slot in range(slots)]
    sides = []
    for stacks, axis in ((case.lora_a, 1), (case.lora_b, 2)):
        shape, slices = stacks[0].shape, len(stacks)
        pages = slices * shape[1] * sum(map(pages_for, ranks))
        arena = Arena(shape, slices, axis, stacks[0].dtype, device, pages)
        arena.memory.fill_(cases.NAN)
        writes = [(slot, index) for slot in range(slots) for index in range(slices)]
        first = order.sample(writes, len(writes) // 2)
        made = arena.stacks()
        for slot, index in first:  # others, that give their pages back in another order
            made[index].write(slot, stacks[index][slot].narrow(axis, 0, ranks[slot]))
        for slot, index in order.sample(first, len(first)):
            made[index][slot] = 0
        for slot, index in order.sample(writes, len(writes)):
            made[index].write(slot, stacks[index][slot].narrow(axis, 0, ranks[slot]))
        sides.append(list(made))
    return dataclasses.replace(case, lora_a=sides[0], lora_b=sides[1])
