"""Chains whose failures nobody is told of, and failures that come from the machine itself.

A device's notification, an ejection and auto-online swallow errors: what they leave is compared
with a machine that was brought to that state on purpose.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable

import pytest

from kmm import KernelError, Machine
from kmm import memory_hotplug as mh
from kmm.errors import ImpossibleState
from kmm.memory_block import (
    MEM_GOING_OFFLINE,
    MEM_GOING_ONLINE,
    MemoryNotifier,
    register_memory_notifier,
)
from kmm.snapshot import differences, dump
from kmm.trace import FALLIBLE
from tests.conftest import DIMM, two_nodes
from tests.settle import settled_differences

BLOCK, BLOCKS = 128 << 20, 3
MEMORY = "/sys/devices/system/memory"
MMOM = "memory_hotplug.memmap_on_memory=1"
OFFLINE, MOVABLE = "memhp_default_state=offline", "memhp_default_state=online_movable"


def plug(m: Machine, blocks: int = BLOCKS) -> int:
    return m.plug("a", 1, DIMM, blocks * BLOCK)


def plugged(cmdline: str) -> Callable[[], Machine]:
    def make() -> Machine:
        m = two_nodes(cmdline)
        plug(m)
        return m

    return make


def steps(make: Callable[[], Machine], act: Callable[[Machine], object]) -> list[tuple[str, int]]:
    """The first, a middle and the last call of each function that can fail on the way."""
    m = make()
    probes = m.trace()
    act(m)
    counts: Counter[str] = Counter()
    for _, name, times in probes.calls:
        counts[str(name)] += int(str(times))
    found = []
    for name, n in sorted(counts.items()):
        # Every second notification tells what has happened; a refusal of that is not heard.
        picked = {1, n - 1} if name == "memory_notify" else {1, (n + 1) // 2, n}
        if name in FALLIBLE:
            found += [(name, nth) for nth in sorted(picked)]
    return found


def fail(m: Machine, function: str, nth: int, act: Callable[[Machine], object]) -> object:
    probes = m.trace(recording=False)
    probes.fail(function, errno.ENOMEM, nth)
    try:
        return act(m)
    finally:
        assert probes.pending() == []
        m.kprobes = None


@pytest.mark.parametrize("cmdline", [OFFLINE, f"{OFFLINE} {MMOM}"])
@pytest.mark.parametrize(("function", "nth"), steps(lambda: two_nodes(OFFLINE), plug))
def test_a_device_that_cannot_be_added_leaves_only_itself(
    cmdline: str, function: str, nth: int
) -> None:
    m = two_nodes(cmdline)
    before = dump(m)
    assert fail(m, function, nth, plug) == 0
    if m.memory_blocks.get(32) is None:
        assert [d for d in differences(before, dump(m)) if not d.startswith("/dimms/")] == []
        assert m.swallowed
    else:
        assert function == "__alloc_pages" and m.vmemmap_basepages
    m.validate()
    assert m.unplug("a") == 0
    m.validate()


@pytest.mark.parametrize("cmdline", [MOVABLE, "memhp_default_state=online_kernel"])
@pytest.mark.parametrize(
    ("function", "nth"),
    steps(lambda: two_nodes(MOVABLE), lambda m: mh.add_memory(m, 1, DIMM, BLOCKS * BLOCK)),
)
def test_auto_online_stops_at_the_block_that_fails(cmdline: str, function: str, nth: int) -> None:
    m = two_nodes(cmdline)
    before = dump(m)
    try:
        fail(m, function, nth, lambda m: mh.add_memory(m, 1, DIMM, BLOCKS * BLOCK))
    except KernelError as e:
        assert e.errno == errno.ENOMEM
        assert differences(before, dump(m)) == []
        m.validate()
        return
    if m.vmemmap_basepages:
        assert function == "__alloc_pages"
        return
    states = [m.memory_blocks[32 + i].state for i in range(BLOCKS)]
    online = states.count("online")
    assert states == ["online"] * online + ["offline"] * (BLOCKS - online)
    assert online < BLOCKS
    on_purpose = two_nodes(cmdline)
    word = on_purpose.read(f"{MEMORY}/auto_online_blocks").strip()
    on_purpose.write(f"{MEMORY}/auto_online_blocks", "offline")
    mh.add_memory(on_purpose, 1, DIMM, BLOCKS * BLOCK)
    for i in range(online):
        on_purpose.write(f"{MEMORY}/memory{32 + i}/state", word)
    on_purpose.write(f"{MEMORY}/auto_online_blocks", word)
    assert differences(dump(on_purpose), dump(m)) == []
    m.validate()


@pytest.mark.parametrize(
    ("cmdline", "function", "nth"),
    [
        (cmdline, function, nth)
        for cmdline in (OFFLINE, MOVABLE)
        for function, nth in steps(plugged(cmdline), lambda m: m.unplug("a"))
    ],
)
def test_an_ejection_succeeds_in_its_second_pass(cmdline: str, function: str, nth: int) -> None:
    m = plugged(cmdline)()
    try:
        status = fail(m, function, nth, lambda m: m.unplug("a"))
    except ImpossibleState as e:
        # With everything offline nothing may fail any more; the kernel stops there too.
        assert "remove_memory" in str(e)
        return
    assert status == 0
    plain = plugged(cmdline)()
    assert plain.unplug("a") == 0
    assert settled_differences(dump(plain), dump(m)) == []
    m.validate()


def test_a_refused_ejection_brings_every_block_back() -> None:
    m = plugged(MOVABLE)()
    before = dump(m)

    def veto(m: Machine, act: int, arg) -> int:
        return -16 if act == MEM_GOING_OFFLINE and last(arg) else 0

    register_memory_notifier(m, MemoryNotifier("veto", veto))
    assert m.unplug("a") == 0x82
    # The default policy does not know that they were movable before.
    blocks = [m.memory_blocks[32 + i] for i in range(BLOCKS)]
    assert [b.state for b in blocks] == ["online"] * BLOCKS
    assert [b.zone.name for b in blocks if b.zone] == ["Normal", "Normal", "Movable"]
    after = dump(m)
    for layer in ("iomem", "firmware_map", "acpi", "dimms", "vmemmap"):
        assert before[layer] == after[layer], layer
    m.validate()


def last(arg) -> bool:
    return arg.start_pfn == (DIMM >> 12) + (BLOCKS - 1) * 32768


@pytest.mark.parametrize("middle", range(5))
def test_a_section_that_is_there_already_refuses_the_whole_add(m: Machine, middle: int) -> None:
    start = DIMM >> 12
    mh.__add_pages(m, 1, start + middle * 32768, 32768)
    before = dump(m)
    with pytest.raises(KernelError) as e:
        mh.add_memory(m, 1, DIMM, 5 * BLOCK)
    assert e.value.errno == errno.EEXIST
    assert differences(before, dump(m)) == []


def with_single_pages(count: int) -> Machine:
    """A machine whose node 0 has nothing but so many free pages, none beside another."""
    m = two_nodes()
    taken = []
    for zone in m.nodes[0].zones[:2]:
        zone.drain()
        while (pfn := zone.rmqueue(0, 1)) >= 0:
            taken.append(pfn)
        zone.watermark_min = zone.watermark_low = zone.watermark_high = 0
        zone.lowmem_reserve = [0] * 5
    m.free_pages_bulk(sorted(taken)[: 2 * count : 2])
    for zone in m.nodes[0].zones[:2]:
        zone.drain()
    assert sum(z.nr_free_pages for z in m.nodes[0].zones) == count
    return m


@pytest.mark.parametrize("count", [0, 1, 300, 511, 512, 513, 900, 1023, 1500])
def test_a_memmap_that_runs_out_of_pages_takes_none(count: int) -> None:
    """Two sections need 512 pages each, and perhaps some for page tables."""
    m = with_single_pages(count)
    before = dump(m)
    if count > 1100:
        mh.add_memory(m, 1, DIMM, 2 * BLOCK)
        assert m.vmemmap_basepages
        return
    with pytest.raises(KernelError) as e:
        mh.add_memory(m, 1, DIMM, 2 * BLOCK)
    assert e.value.errno == errno.ENOMEM
    assert differences(before, dump(m)) == []


@pytest.mark.parametrize("page", [0, 511, 512, 16384, 32767])
def test_a_page_in_use_anywhere_refuses_the_offline(m: Machine, page: int) -> None:
    plug(m, 1)
    m.write(f"{MEMORY}/memory32/state", "online_kernel")
    zone, pfns, keep = m.nodes[1].zone(2), [], (DIMM >> 12) + page
    while (pfn := zone.rmqueue(0, 0)) >= 0:
        pfns.append(pfn)
    m.free_pages_bulk([pfn for pfn in pfns if pfn != keep])
    assert len(pfns) == 32768 and m.memmap_engine.is_allocated(keep, 0)
    before = dump(m)
    with pytest.raises(KernelError) as e:
        m.write(f"{MEMORY}/memory32/state", "offline")
    assert e.value.errno == errno.EBUSY
    assert settled_differences(before, dump(m)) == []
    m.validate()
    m.free_pages(keep)
    m.write(f"{MEMORY}/memory32/state", "offline")
    m.validate()


@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("event", [MEM_GOING_ONLINE, MEM_GOING_OFFLINE])
def test_a_veto_at_any_block_of_a_removal(m: Machine, block: int, event: int) -> None:
    """An offline that is refused undoes the ones before it; their online may not be refused."""
    mh.add_memory(m, 1, DIMM, BLOCKS * BLOCK)
    for i in range(BLOCKS):
        m.write(f"{MEMORY}/memory{32 + i}/state", "online_movable")
    before = dump(m)
    at = (DIMM >> 12) + block * 32768

    def veto(m: Machine, act: int, arg) -> int:
        refuse = act == event and arg.start_pfn == at
        # So that there is something to bring back.
        return -16 if refuse or (act == MEM_GOING_OFFLINE and last(arg)) else 0

    register_memory_notifier(m, MemoryNotifier("veto", veto))
    with pytest.raises(KernelError) as e:
        mh.offline_and_remove_memory(m, DIMM, BLOCKS * BLOCK)
    assert e.value.errno == errno.EBUSY
    stays = event == MEM_GOING_ONLINE and block < BLOCKS - 1
    assert (m.memory_blocks[32 + block].state == "offline") == stays
    if not stays:
        assert settled_differences(before, dump(m)) == []
    m.validate()
