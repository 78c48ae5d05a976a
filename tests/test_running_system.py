"""What the tasks of a live system leave in zones that hot-plug fills."""

from __future__ import annotations

import errno

import pytest

from kmm import KernelError, Machine, MachineConfig
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.mmzone import Zone
from kmm.params import MIGRATE_UNMOVABLE, ZONE_MOVABLE, ZONE_NORMAL
from kmm.replay import snapshot_files
from kmm.running_system import RemotePagesets, RunningSystem
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


def remote(pages: int) -> tuple[Machine, Zone, RemotePagesets]:
    """Node 2 has no CPU; one that has keeps some of its pages on a list."""
    m = machine(2)
    for block in (32, 33):
        m.write(STATE.format(block), "online_movable")
    pagesets = RemotePagesets(m)
    zone = m.nodes[m.pxm_to_node[2]].zone(ZONE_MOVABLE)
    user = User(m, "hog", "shmem", pages, policy=new_policy(m, "bind", [zone.nid]))
    user.fault(0, pages)
    return m, zone, pagesets


def test_a_cpu_gives_back_pages_of_another_node_when_it_has_left_them_alone() -> None:
    m, zone, pagesets = remote(100)
    kept = zone.pcp_state(0)[0]
    batch = zone.pcp_state(0)[2]
    assert 0 < kept < batch
    pagesets.settle()
    assert zone.pcp_state(0)[0] == kept
    pagesets.wait_for_snapshot()
    assert zone.pcp_state(0)[0] == kept
    pagesets.settle()
    assert zone.pcp_state(0)[0] == 0
    m.validate()


def test_each_use_begins_the_time_anew_and_one_batch_goes() -> None:
    m, zone, pagesets = remote(1000)
    m.users["hog"].release(0, 1000)
    count, _, batch, _ = zone.pcp_state(0)
    assert count > 2 * batch
    pagesets.look()
    pagesets.wait(2.0)
    m.users["hog"].fault(0, 1)
    pagesets.look()
    pagesets.wait(2.0)
    assert zone.pcp_state(0)[0] == count - 1
    pagesets.wait(1.0)
    assert zone.pcp_state(0)[0] == count - 1 - batch
    assert batch > zone.stat_threshold
    pagesets.wait(60.0)
    assert zone.pcp_state(0)[0] == count - 1 - batch
    m.validate()


def test_what_the_kernel_takes_for_itself_is_counted_at_once_and_stays() -> None:
    m, zone, pagesets = remote(0)
    m.free_pages(m.alloc_pages(0, 0x100CCA, zone.nid))  # no page of it comes to a LRU list
    kept = zone.pcp_state(0)[0]
    assert kept > 0
    pagesets.settle()
    pagesets.wait(60.0)
    assert zone.pcp_state(0)[0] == kept
    m.validate()


@pytest.mark.parametrize(("pages", "left_alone"), [(10000, True), (30000, False)])
def test_a_program_in_the_background_works_while_its_line_sleeps(
    pages: int, left_alone: bool
) -> None:
    m, zone, pagesets = remote(100)
    pagesets.after_load({"kind": "anon", "pages": pages})
    pagesets.wait(4.0)
    pagesets.settle()
    assert (zone.pcp_state(0)[0] == 0) == left_alone
    m.validate()


def test_one_that_ends_gives_its_pages_back_in_the_background() -> None:
    m, zone, pagesets = remote(0)
    policy = new_policy(m, "bind", [zone.nid])
    User(m, "task", "anon", 30000, policy=policy).fault(0, 30000)
    pagesets.after_load({"kind": "anon", "user": "task", "pages": 0})
    m.users["task"].close()
    kept, _, batch, _ = zone.pcp_state(0)
    assert kept > batch
    pagesets.after_load({"kind": "anon", "user": "task", "free": True})
    pagesets.wait(3.0)
    assert zone.pcp_state(0)[0] == kept
    pagesets.wait(0.5)
    assert zone.pcp_state(0)[0] == kept - batch
    m.validate()


def test_lists_that_a_program_leaves_alone_do_not_wait_for_it() -> None:
    m, zone, pagesets = remote(100)
    pagesets.look()
    User(m, "task", "anon", 50000).fault(0, 50000)
    pagesets.after_load({"kind": "anon", "user": "task", "pages": 50000})
    pagesets.wait(4.0)
    assert zone.pcp_state(0)[0] == 0
    m.validate()


def test_pages_of_a_cpus_own_node_stay_on_its_list() -> None:
    m = machine(1)
    for block in (32, 33):
        m.write(STATE.format(block), "online_movable")
    pagesets = RemotePagesets(m)
    zone = m.nodes[1].zone(ZONE_MOVABLE)
    user = User(m, "hog", "anon", 100, cpu=1)
    user.fault(0, 100)
    kept = zone.pcp_state(1)[0]
    assert kept > 0
    pagesets.look()
    pagesets.wait(60)
    assert zone.pcp_state(1)[0] == kept
    m.validate()
