"""Whole machines: random lives that validate() follows, determinism, sizes, boot."""

from __future__ import annotations

import subprocess
import sys
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from kmm import (
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL,
    FirmwareRefused,
    KernelError,
    Machine,
    MachineConfig,
)
from kmm import memory_hotplug as mh
from kmm.memory_block import MemoryNotifier, register_memory_notifier
from kmm.params import STATE_ALLOCATED
from kmm.snapshot import differences, dump
from tests.conftest import DIMM, two_nodes
from tests.settle import settled_differences

MEMORY = "/sys/devices/system/memory"
SECTION = 128 << 20
CMDLINES = [
    "memhp_default_state=offline",
    "memhp_default_state=online memory_hotplug.online_policy=auto-movable",
    "memhp_default_state=online_kernel",
    "memhp_default_state=online_movable memory_hotplug.memmap_on_memory=1",
    "memhp_default_state=online movable_node",
]


class Life(RuleBasedStateMachine):
    """DIMMs come and go, users write to files, pages are taken and given back."""

    @initialize(cmdline=st.sampled_from(CMDLINES), seed=st.integers(0, 99))
    def boot(self, cmdline: str, seed: int) -> None:
        nodes = [{"cpus": "0", "memory": "512M"}, {"cpus": "1", "memory": "512M"}, {}]
        data = {"memory": "1G", "maxmem": "16G", "cpus": 2, "nodes": nodes, "cmdline": cmdline}
        self.m = Machine(MachineConfig.from_dict({**data, "seed": seed}))
        self.held: list[tuple[Any, int]] = []
        self.nth = 0
        self.veto = 0
        register_memory_notifier(
            self.m, MemoryNotifier("veto", lambda m, act, arg: self.veto if act in (2, 8) else 0)
        )

    def try_(self, act: Any, compare: Any = differences, allowed: tuple[str, ...] = ()) -> bool:
        """Whether it was done; what is refused must leave the machine as it was.

        ``compare`` and ``allowed`` say what the kernel too leaves behind (symbols.LEFT_BEHIND).
        """
        before = dump(self.m)
        try:
            act()
        except (KernelError, FirmwareRefused):
            changed = compare(before, dump(self.m))
            assert [c for c in changed if not c.startswith(allowed or ("!",))] == []
            self.m.validate()
            return False
        self.m.validate()
        return True

    @rule(
        slot=st.integers(0, 11),
        size=st.sampled_from([1, 1, 2, 3, 5]),
        node=st.integers(0, 2),
        odd=st.sampled_from([0, 0, 0, 2 << 20]),
    )
    def plug(self, slot: int, size: int, node: int, odd: int) -> None:
        self.nth += 1
        addr = DIMM + slot * SECTION
        dimm = f"d{self.nth}"
        self.try_(
            lambda: self.m.plug(dimm, node, addr, size * SECTION + odd),
            allowed=("/dimms/backends",),  # the platform keeps the backend of a refused DIMM
        )

    @rule(index=st.integers(0, 30))
    def unplug(self, index: int) -> None:
        names = sorted(self.m.dimms)
        if names:
            self.try_(lambda: self.m.unplug(names[index % len(names)]))

    @rule(
        index=st.integers(0, 60),
        word=st.sampled_from(["online", "online_kernel", "online_movable", "offline", "bogus"]),
    )
    def write_state(self, index: int, word: str) -> None:
        blocks = sorted(self.m.memory_blocks)
        block = blocks[index % len(blocks)]
        wish = (f"/blocks/{block}/online_type",) if word.startswith("online") else ()
        self.try_(
            lambda: self.m.write(f"{MEMORY}/memory{block}/state", word),
            settled_differences if word == "offline" else differences,
            wish,  # spent, if an earlier refusal left one, or left behind
        )

    # Memory that no device brought lies beyond all DIMMs.
    @rule(slot=st.integers(20, 25), odd=st.sampled_from(["", "1", "000"]))
    def probe(self, slot: int, odd: str) -> None:
        self.try_(lambda: self.m.write(f"{MEMORY}/probe", f"{DIMM + slot * SECTION:#x}{odd}"))

    @rule(slot=st.integers(20, 25), nr=st.integers(1, 3))
    def remove(self, slot: int, nr: int) -> None:
        first = DIMM // SECTION + slot
        # Whoever removes memory has to know what it added.
        if all(first + i in self.m.memory_blocks for i in range(nr)):
            self.try_(lambda: mh.remove_memory(self.m, DIMM + slot * SECTION, nr * SECTION))

    @rule(
        index=st.integers(0, 60),
        page=st.integers(0, 32767),
        how=st.sampled_from(["soft_offline_page", "hard_offline_page"]),
    )
    def retire(self, index: int, page: int, how: str) -> None:
        blocks = sorted(self.m.memory_blocks)
        pfn = blocks[index % len(blocks)] * 32768 + page
        # A page in use is marked and counted by a hard failure all the same.
        marked = (f"/records/pages/{pfn >> 9}", "/totals/hwpoison", "/totals/num_poisoned_pages")
        self.try_(
            lambda: self.m.write(f"{MEMORY}/{how}", hex(pfn << 12)),
            settled_differences,
            marked if how == "hard_offline_page" else (),
        )

    @rule(
        n=st.integers(1, 3000),
        order=st.sampled_from([0, 0, 1, 3, 9]),
        gfp=st.sampled_from([GFP_KERNEL, GFP_HIGHUSER_MOVABLE]),
        node=st.integers(0, 2),
    )
    def allocate(self, n: int, order: int, gfp: int, node: int) -> None:
        pfns = self.m.alloc_pages_bulk(n >> order or 1, order, gfp, node)
        assert len(set(pfns.tolist())) == len(pfns)
        self.held.append((pfns, order))
        self.m.validate()

    @rule(index=st.integers(0, 99), seed=st.integers(0, 99))
    def free(self, index: int, seed: int) -> None:
        if self.held:
            pfns, order = self.held.pop(index % len(self.held))
            self.m.free_pages_bulk(np.random.default_rng(seed).permutation(pfns), order)
            self.m.validate()

    @rule(code=st.sampled_from([0, 0, -16, -1]))
    def set_veto(self, code: int) -> None:
        self.veto = code

    @rule(
        path=st.sampled_from(
            ["/proc/sys/vm/min_free_kbytes", "/proc/sys/vm/watermark_scale_factor"]
        ),
        value=st.sampled_from(["10", "4096", "100000", "-3"]),
    )
    def tune(self, path: str, value: str) -> None:
        self.try_(lambda: self.m.write(path, value))

    def teardown(self) -> None:
        if hasattr(self, "m"):
            for pfns, order in self.held:
                self.m.free_pages_bulk(pfns, order)
            self.m.validate()


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=45,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_the_same_calls_give_the_same_machine() -> None:
    def life() -> Machine:
        m = two_nodes("memhp_default_state=online")
        m.plug("a", 1, DIMM, 4 * SECTION)
        pfns = m.alloc_pages_bulk(777, 0, GFP_KERNEL, 1)
        m.free_pages_bulk(pfns[::3])
        m.unplug("a")
        return m

    one, two = life(), life()
    assert differences(dump(one), dump(two)) == []
    assert (one.log, one.uevents, one.ost_events) == (two.log, two.uevents, two.ost_events)
    one.validate()


# A process of its own, so that no memory of other tests is counted.
RESIDENT = """
from tests.conftest import two_nodes
def resident():
    pages = open("/proc/self/statm").read().split()[1]
    return int(pages) * 4096 >> 20
m = two_nodes("memhp_default_state=online_movable", memory="32G", maxmem="2T",
              nodes=[{"cpus": "0-1", "memory": "32G"}, {}])
before = resident()
assert m.plug("big", 1, 1 << 40, 1 << 40) == 0
assert m.nodes[1].zone(3).nr_free_pages == 1 << 28
assert m.memmap_engine.dirty_blocks(1 << 28, 1 << 28) == 0
online = resident()
assert m.unplug("big") == 0
print(online - before, resident() - before)
m.validate()
"""


def test_a_terabyte_that_is_online_and_free_costs_tens_of_mebibytes() -> None:
    """Resident memory, measured: the kernel's own memmap would take 16 GiB."""
    run = subprocess.run(
        [sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True
    )
    online, unplugged = map(int, run.stdout.split())
    assert 4 <= online <= 32
    assert unplugged <= online - 4


def test_addresses_reach_64_tib() -> None:
    m = two_nodes(
        maxmem="64T",
        block_size=2 << 30,
        memory="8G",
        nodes=[{"cpus": "0-1", "memory": "8G"}, {}],
    )

    top = 1 << 46
    mh.add_memory(m, 1, top - (4 << 30), 4 << 30)
    m.write(f"{MEMORY}/memory{(top >> 31) - 1}/state", "online_kernel")
    pfn = m.alloc_pages(0, GFP_KERNEL, 1)
    assert pfn >= (top - (2 << 30)) >> 12
    pfns = m.alloc_pages_bulk(10_000, 0, GFP_KERNEL, 1)
    m.free_pages_bulk(pfns[::-1])
    m.free_pages(pfn)
    m.validate()


@pytest.mark.parametrize("memory", ["128M", "512M", "1G", "2816M", "3G", "12G", "96G"])
def test_boot_of_any_size_is_consistent(memory: str) -> None:
    m = Machine(MachineConfig.from_dict({"memory": memory, "maxmem": "256G"}))
    m.validate()
    zones = m.read("/proc/zoneinfo")
    assert "Node 0, zone      DMA\n" in zones
    assert "System RAM" in m.read("/proc/iomem")
    assert m.totalram_pages > 0.85 * (sum(n.memory for n in m.config.nodes) >> 12) - 30000


def test_64_nodes_with_distances() -> None:
    nodes: list[dict[str, Any]] = [{"cpus": "0", "memory": "512M"}] + [{} for _ in range(63)]
    matrix = [[10 if a == b else 20 + abs(a - b) for b in range(64)] for a in range(64)]
    m = Machine(
        MachineConfig.from_dict(
            {
                "memory": "512M",
                "maxmem": "64G",
                "slots": 64,
                "nodes": nodes,
                "distances": matrix,
                "srat": "full",
                "cmdline": "memhp_default_state=online_movable",
            }
        )
    )
    for pxm in (1, 2, 40):
        assert m.plug(f"d{pxm}", pxm, DIMM + pxm * SECTION, SECTION) == 0
    assert len(m.n_memory) == 4
    order = m.nodes[m.pxm_to_node[40]].fallback_order
    assert order == [m.pxm_to_node[p] for p in (40, 2, 1, 0)]
    m.validate()


def test_views_are_zero_copy() -> None:
    m = two_nodes()
    assert m.memmap.base is not None
    assert m.memmap.dtype.itemsize + m.page_states.dtype.itemsize <= 16
    pfn = m.alloc_pages()
    assert m.page_states[pfn] == STATE_ALLOCATED
    m.free_pages(pfn)
    assert m.page_states[pfn] & STATE_ALLOCATED == 0
    m.validate()


def test_machines_do_not_share_state() -> None:
    one, two = two_nodes(), two_nodes()
    before = dump(two)
    one.plug("a", 1, DIMM, SECTION)
    one.write("/proc/sys/vm/min_free_kbytes", "9999")
    assert differences(before, dump(two)) == []
    two.validate()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: m.plug("a", -1, DIMM, SECTION), "nid: -1; allowed"),
        (lambda m: m.plug("a", "x", DIMM, SECTION), "nid: 'x'; allowed"),
        (lambda m: m.plug("a", 1, DIMM, -SECTION), "size: -134217728; allowed"),
        (lambda m: m.plug("a", 1, 4.5, SECTION), "start: 4.5; allowed"),
        (lambda m: m.plug(7, 1, DIMM, SECTION), "dimm_id: 7; allowed: text"),
        (lambda m: m.write("/proc/sys/vm/min_free_kbytes", 5000), "value: 5000; allowed: text"),
        (lambda m: m.read(None), "path: None; allowed: text"),
        (lambda m: m.alloc_pages(11), "order: 11; allowed: a number from 0 to 10"),
        (lambda m: m.alloc_pages(nid=9), "nid: 9; allowed: a number from 0 to 1"),
        (lambda m: m.alloc_pages(0, "x"), "gfp: 'x'; allowed"),
        (lambda m: m.alloc_pages_bulk(-1), "n: -1; allowed"),
        (lambda m: m.alloc_pages_bulk(1, 12), "order: 12; allowed"),
        (lambda m: m.alloc_pages_bulk(9, out=np.zeros(3, dtype=np.uint64)), "out: allowed"),
        (lambda m: m.alloc_pages_bulk(3, out=np.zeros(3, dtype=np.int32)), "out: allowed"),
        (lambda m: m.free_pages(-1), "pfn: -1; allowed"),
        (lambda m: m.free_pages(5, 12), "order: 12; allowed"),
        (lambda m: m.free_pages_bulk([-1]), "pfns: .*; allowed"),
        (lambda m: m.free_pages_bulk(["a"]), "pfns: .*; allowed"),
        (lambda m: m.free_pages_bulk([1.5]), r"pfns: \[1.5\]; allowed"),
        (lambda m: m.free_pages_bulk(5), "pfns: 5; allowed: a list of numbers from 0 to 2"),
        (lambda m: m.free_pages_bulk(np.uint64(5)), "pfns: .*5.*; allowed: a list"),
        (lambda m: m.free_pages_bulk([[5, 6], [7, 8]]), r"pfns: \[\[5, 6\], \[7, 8\]\]; allowed"),
        (
            lambda m: m.free_pages_bulk(np.zeros((2, 3), dtype=np.uint64)),
            r"pfns: an array of shape \(2, 3\) and dtype uint64; allowed",
        ),
        (lambda m: m.free_pages_bulk(np.zeros((0, 3), dtype=np.int64)), "pfns: an array of shape"),
        (lambda m: m.free_pages_bulk(np.array(5)), r"pfns: an array of shape \(\)"),
        (
            lambda m: m.free_pages(1 << 64),
            "pfn: 18446744073709551616; allowed: .* to 1844674407370",
        ),
        (lambda m: m.split_page(1 << 64, 1), "pfn: 18446744073709551616; allowed: .* to 184467440"),
        (lambda m: m.free_pages(True), "pfn: True; allowed"),
        (lambda m: m.free_pages((1 << 64) - 1), "EFAULT"),
        (lambda m: m.split_page((1 << 64) - 1, 0), "EFAULT"),
        (lambda m: m.free_pages_bulk([(1 << 64) - 1]), "EFAULT"),
        (lambda m: m.plug_container([]), r"dimms: \[\]; allowed: .* of one DIMM or more"),
        (lambda m: m.alloc_pages(0, GFP_KERNEL | 0x18), "gfp: 0xcd8; allowed: movable or"),
        (lambda m: m.alloc_pages_bulk(3, 0, GFP_KERNEL | 0x18), "gfp: 0xcd8; allowed"),
        (lambda m: m.kpageflags(0, -1), "count: -1; allowed"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(act: Any, message: str) -> None:
    m = two_nodes()
    before = dump(m)
    with pytest.raises(KernelError, match=message):
        act(m)
    assert differences(before, dump(m)) == []
    m.validate()


@pytest.mark.parametrize(
    "buffer",
    [
        lambda: array("Q", bytes(40)),
        lambda: memoryview(bytearray(40)).cast("Q"),
        lambda: np.zeros(5, dtype=np.uint64).view(np.recarray),
    ],
)
@pytest.mark.parametrize("n", [0, 3, 5])
def test_whatever_is_filled_an_array_comes_back(buffer: Callable[[], Any], n: int) -> None:
    m, other = two_nodes(), two_nodes()
    room = buffer()
    pfns = m.alloc_pages_bulk(n, out=room)
    assert type(pfns) is np.ndarray and pfns.dtype == np.uint64
    assert pfns.tolist() == other.alloc_pages_bulk(n).tolist() == list(room)[:n]
    if n:
        assert np.shares_memory(pfns, np.asarray(room))
    m.free_pages_bulk(pfns)
    m.validate()


def test_no_pages_are_freed_of_an_empty_list() -> None:
    m = two_nodes()
    before = dump(m)
    for nothing in ([], (), np.zeros(0), np.zeros(0, dtype=np.uint64), array("Q")):
        m.free_pages_bulk(nothing)
    assert differences(before, dump(m)) == []


def test_a_block_freed_twice_in_one_call_frees_nothing() -> None:
    m = two_nodes()
    for order in (0, 3, 9, 10):
        pfns = m.alloc_pages_bulk(3, order).tolist()
        before = dump(m)
        with pytest.raises(KernelError, match="index 3"):
            m.free_pages_bulk([*pfns, pfns[0]], order)
        assert differences(before, dump(m)) == []
        m.free_pages_bulk(pfns, order)
    m.validate()
