"""What the tasks of a live system leave in zones that hot-plug fills."""

from __future__ import annotations

import errno

import pytest

from kmm import KernelError, Machine, MachineConfig
from kmm.mmzone import Zone
from kmm.params import MIGRATE_UNMOVABLE, ZONE_MOVABLE, ZONE_NORMAL
from kmm.replay import snapshot_files
from kmm.running_system import RunningSystem
from tests.conftest import DIMM

CONFIG = {
    "memory": "1G",
    "maxmem": "16G",
    "cpus": 2,
    "nodes": [{"cpus": "0", "memory": "1G"}, {"cpus": "1"}, {}],
}
STATE = "/sys/devices/system/memory/memory{}/state"


def machine(nid: int) -> Machine:
    """Node 1 has CPU 1, node 2 has none; one of them gets two blocks, offline still."""
    m = Machine(MachineConfig.from_dict(CONFIG))
    m.plug("a", nid, DIMM, 256 << 20)
    return m


def online(m: Machine, kind: str, system: RunningSystem) -> None:
    for block in (32, 33):
        m.write(STATE.format(block), kind)
        system.run()


def quiet(zone: Zone) -> bool:
    return zone.nr_free_pages == zone.managed_pages


def test_the_first_block_of_a_kernel_zone_that_serves_a_cpu_stays() -> None:
    m = machine(1)
    system = RunningSystem(m)
    online(m, "online_kernel", system)
    with pytest.raises(KernelError) as error:
        m.write(STATE.format(32), "offline")
    assert error.value.errno == errno.EBUSY
    assert "pfn:0x100000" in m.log[-3]
    m.write(STATE.format(33), "offline")
    m.write(STATE.format(33), "online_kernel")
    m.validate()


def test_one_page_is_taken_of_a_zone_and_no_more() -> None:
    m = machine(1)
    system = RunningSystem(m)
    online(m, "online_kernel", system)
    zone = m.nodes[1].zone(ZONE_NORMAL)
    used = zone.managed_pages - zone.nr_free_pages - zone.pcp_pages()
    system.run()
    assert used == zone.managed_pages - zone.nr_free_pages - zone.pcp_pages() == 1
    assert zone.pcp_state(1)[0] == zone.pcp_pages() > 0
    m.validate()


def test_a_kernel_zone_that_is_not_the_nearest_of_any_cpu_stays_quiet(m: Machine) -> None:
    """Both CPUs are on node 0, which has memory of its own."""
    m.plug("a", 1, DIMM, 256 << 20)
    online(m, "online_kernel", RunningSystem(m))
    assert quiet(m.nodes[1].zone(ZONE_NORMAL))
    m.write(STATE.format(32), "offline")
    m.validate()


def test_a_node_without_cpus_serves_those_of_its_neighbour() -> None:
    """CPU 1 has no memory beside it, and falls back to node 2 before node 0."""
    m = machine(2)
    online(m, "online_kernel", RunningSystem(m))
    assert m.nodes[1].fallback_order == [1, 2, 0]
    assert m.nodes[2].zone(ZONE_NORMAL).pcp_state(1)[0] > 0
    with pytest.raises(KernelError):
        m.write(STATE.format(32), "offline")
    m.validate()


def test_a_movable_zone_that_serves_a_cpu_is_not_quiet_but_goes_offline() -> None:
    m = machine(1)
    system = RunningSystem(m)
    zone = m.nodes[1].zone(ZONE_MOVABLE)
    online(m, "online_movable", system)
    assert zone.managed_pages - zone.nr_free_pages == zone.pcp_pages() > 0
    m.write(STATE.format(32), "offline")
    assert quiet(zone)
    system.run()
    assert not quiet(zone)
    m.write(STATE.format(33), "offline")
    system.run()
    assert not zone.populated
    m.validate()


def test_a_zone_that_was_emptied_gets_slabs_anew() -> None:
    """The zone has memory when the system is first seen, and nothing in use."""
    first = machine(1)
    first.write(STATE.format(32), "online_kernel")
    m = Machine.from_files(snapshot_files(first), CONFIG)
    system = RunningSystem(m)
    system.run()
    assert quiet(m.nodes[1].zone(ZONE_NORMAL))
    m.write(STATE.format(32), "offline")
    system.run()
    m.write(STATE.format(32), "online_kernel")
    system.run()
    assert not quiet(m.nodes[1].zone(ZONE_NORMAL))
    m.validate()


def test_a_zone_below_its_mark_gives_nothing() -> None:
    m = machine(1)
    system = RunningSystem(m)
    m.write(STATE.format(32), "online_kernel")
    zone = m.nodes[1].zone(ZONE_NORMAL)
    pfns = []
    while zone.nr_free_pages > zone.low_wmark_pages():
        pfns.append(zone.rmqueue(5, MIGRATE_UNMOVABLE))
    system.run()
    assert zone.nr_free_pages + 32 * len(pfns) == zone.managed_pages
    for pfn in pfns:
        m.free_pages(pfn, order=5)
    system.run()
    assert not quiet(zone)
    m.validate()


def test_nothing_is_recorded_of_what_the_tasks_do() -> None:
    m = machine(1)
    lines, events = len(m.log), len(m.uevents)
    RunningSystem(m).run()
    assert (lines, events) == (len(m.log), len(m.uevents))
