"""Where free and used memory lies in a machine built from files.

A node's line of addresses, after boot:

    |kernel image| slabs and later pages ->        free        <- memmap, NODE_DATA |

Expect: the first block behind the image and the last one stay, all between go offline.
"""

from __future__ import annotations

import re
import time

import pytest

from kmm import GFP_KERNEL, ConfigError, KernelError, Machine, MachineConfig
from kmm.params import KPF_RESERVED
from kmm.procfs import kpageflags
from kmm.replay import boot_machine, snapshot_files
from tests.conftest import recording

CONFIG = {
    "memory": "4G",
    "maxmem": "16G",
    "cpus": 1,
    "nodes": [{"cpus": "0", "memory": "1G"}, {"memory": "512M"}, {"memory": "2560M"}],
}
TYPES = "Node 0, zone    DMA32 {:12} {:12} {:12} {:12} {:12} "
SLAB, RESERVED = 1 << 9, 1 << 12


def state(block: int) -> str:
    return f"/sys/devices/system/memory/memory{block}/state"


def offline(m: Machine, block: int) -> bool:
    """Try to take a block offline, bring it back if it went, and say whether it did."""
    try:
        m.write(state(block), "offline")
    except KernelError:
        return False
    m.write(state(block), "online")
    return True


def saved(pages: int = 0, nid: int = 1) -> Machine:
    """A machine rebuilt from the files of one whose kernel took more pages of a node."""
    m = Machine(MachineConfig.from_dict(CONFIG))
    if pages:
        m.alloc_pages_bulk(pages >> 10, order=10, gfp=GFP_KERNEL, nid=nid)
    return Machine.from_files(snapshot_files(m), CONFIG)


def test_the_first_and_the_last_block_of_a_node_stay() -> None:
    m = saved()
    assert [b for b in range(8, 12) if not offline(m, b)] == [8, 11]
    m.validate()


def test_the_page_in_the_way_is_a_slab_below_and_reserved_on_top() -> None:
    m = saved()
    for block, bit in ((8, SLAB), (11, RESERVED)):
        with pytest.raises(KernelError):
            m.write(state(block), "offline")
        flags = int(m.log[-2].split("(")[0].split()[1], 16)
        assert flags & 0xFFFF == bit
    assert "pfn:0x40000" in next(line for line in m.log if line.startswith("page:"))


def test_used_pages_follow_from_the_first_upward() -> None:
    """More pages than a block holds fill the first two; none goes to the top."""
    m = saved(34 << 10)
    assert [b for b in range(8, 12) if not offline(m, b)] == [8, 9, 11]
    m.validate()


def test_each_zone_of_a_node_is_used_from_its_own_bottom() -> None:
    """Node 2 has 1 GiB below and 1.5 GiB above the hole; its slabs lie above."""
    m = saved()
    starts = {z.name: z.zone_start_pfn >> 15 for z in m.nodes[2].zones if z.populated}
    assert starts == {"DMA32": 12, "Normal": 32}
    assert not offline(m, 32)
    assert offline(m, 33)
    assert offline(m, 12)


@pytest.mark.parametrize("name", ["random_3_gib", "early_blocks_4_gib", "four_nodes", "anon"])
def test_a_recorded_machine_has_as_many_reserved_pages(name: str) -> None:
    m = boot_machine(recording(name))
    for zone in (z for z in m.all_zones() if z.populated):
        runs = [run for s, e in zone.early_ranges for run in kpageflags(m, s, e - s)]
        reserved = sum(count for count, word in runs if word & KPF_RESERVED)
        assert reserved == zone.present_pages - zone.managed_pages


def test_pageblocks_reserved_for_atomic_requests_are_counted() -> None:
    data = recording("watermarks")
    files = dict(data["steps"][0]["files"])
    text = files["/proc/pagetypeinfo"]
    assert TYPES.format(52, 446, 6, 0, 0) in text
    files["/proc/pagetypeinfo"] = text.replace(
        TYPES.format(52, 446, 6, 0, 0), TYPES.format(50, 446, 6, 2, 0)
    )
    m = Machine.from_files(files, data["machine"])
    assert m.nodes[0].zone(1).nr_reserved_highatomic == 2 * 512
    m.validate()


def test_a_zone_with_a_hundred_thousand_free_pages_is_built_soon() -> None:
    """A thousand of them took as long as all may take."""
    files = snapshot_files(Machine(MachineConfig.from_dict(CONFIG)))
    for path in ("/proc/pagetypeinfo", "/proc/buddyinfo"):
        files[path] = re.sub(
            r"(Node +2, zone +Normal(?:, type +Movable)?) ( *>?\d+){11} *$",
            r"\1 100000" + 10 * " 0",
            files[path],
            flags=re.M,
        )
    start = time.perf_counter()
    m = Machine.from_files(files, CONFIG)
    assert time.perf_counter() - start < 10
    assert m.nodes[2].zone(2).nr_free() == [100000, *[0] * 10]
    m.validate()


def test_more_free_blocks_than_room_are_refused_at_once() -> None:
    files = snapshot_files(Machine(MachineConfig.from_dict(CONFIG)))
    files["/proc/pagetypeinfo"] = re.sub(
        r"(Node +2, zone +Normal, type +Movable +)\d+",
        r"\g<1>99999999999",
        files["/proc/pagetypeinfo"],
    )
    with pytest.raises(ConfigError, match="zone Normal: its free blocks of order 0 do not fit"):
        Machine.from_files(files, CONFIG)
