"""Sections by the dozen are what sections one by one are."""

from __future__ import annotations

import pytest

from kmm import GFP_KERNEL, Machine, MachineConfig
from kmm.snapshot import differences, dump

START = 1 << 36


def machine(memory: str = "2G") -> Machine:
    config = {"memory": memory, "maxmem": "512G", "nodes": [{"cpus": "0", "memory": memory}, {}]}
    return Machine(MachineConfig.from_dict(config))


def lives(size: int, held: int) -> tuple[Machine, Machine]:
    """The same machine twice: calls of the second are recorded, which takes the slow way."""
    pair = machine(), machine()
    for m, record in zip(pair, (False, True), strict=True):
        m.alloc_pages_bulk(held, 9, GFP_KERNEL)
        if record:
            m.trace()
        m.plug("a", 1, START, size)
    return pair


@pytest.mark.parametrize(
    ("size", "held", "fits"),
    [
        (1 << 27, 0, True),
        (9 << 27, 300, True),
        (80 << 30, 0, True),
        (80 << 30, 300, False),  # runs out of memory on the way
        (9 << 27, 820, True),  # the last chunks get base pages
        (40 << 30, 820, False),
    ],
)
def test_many_sections_at_once(size: int, held: int, fits: bool) -> None:
    one, other = lives(size, held)
    assert differences(dump(one), dump(other)) == []
    one.validate()
    assert (START >> 27 in one.memory_blocks) == fits
    for m in (one, other):
        m.unplug("a")
    assert differences(dump(one), dump(other)) == []
    one.validate()


def test_a_section_that_exists_ends_the_run() -> None:
    m = machine()
    from kmm.memory_hotplug import add_memory

    add_memory(m, 1, START + (3 << 27), 1 << 27)
    m.plug("a", 1, START, 2 << 27)
    assert len([b for b in m.memory_blocks if b >= START >> 27]) == 3
    m.validate()
