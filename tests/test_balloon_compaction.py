"""Balloons and virtio-mem: what they take, what counts as managed, and blocks that go offline."""

from __future__ import annotations

import errno
import re

import numpy as np
import pytest

from kmm import KernelError, Machine
from kmm._page_owner import used_by
from kmm.balloon_compaction import Balloon
from kmm.memory import User
from kmm.memory_block import MemoryNotifier, register_memory_notifier, unregister_memory_notifier
from kmm.mempolicy import new_policy
from kmm.page_alloc import drain_all_pages
from kmm.params import KPF_OFFLINE
from kmm.snapshot import dump
from kmm.virtio_mem import VirtioMem
from kmm.vmstat import all_vm_events
from tests.conftest import DIMM, two_nodes, with_nobody_to_kill
from tests.settle import settled_differences

BLOCK = 128 << 20
PFN = DIMM >> 12
STATE = "/sys/devices/system/memory/memory32/state"


def machine(blocks: int = 1) -> Machine:
    m = two_nodes("memhp_default_state=online_movable")
    m.plug("a", 1, DIMM, blocks * BLOCK)
    return with_nobody_to_kill(m)


def mem_total(m: Machine) -> int:
    found = re.search(r"MemTotal: +(\d+) kB", m.read("/proc/meminfo"))
    assert found is not None
    return int(found[1]) // 4


def balloon_on_node_1(m: Machine, **more: bool) -> Balloon:
    made = Balloon(m, "balloon", 1000, **more)
    made.user.policy = new_policy(m, "bind", [1])
    return made


def test_an_inflated_balloon_is_not_the_systems_memory() -> None:
    m = machine()
    total, managed = mem_total(m), m.nodes[1].zone(3).managed_pages
    made = balloon_on_node_1(m)
    assert made.inflate(300) == 300
    assert mem_total(m) == total - 300
    assert m.nodes[1].zone(3).managed_pages == managed - 300
    assert int(m.kpageflags(int(made.user.pfns()[0]), 1)[0]) & KPF_OFFLINE
    m.validate()
    assert made.deflate(100) == 100
    assert mem_total(m) == total - 200
    assert all_vm_events(m)["balloon_inflate"] == 300
    assert all_vm_events(m)["balloon_deflate"] == 100
    m.validate()
    made.close()
    assert mem_total(m) == total
    assert m.nodes[1].zone(3).managed_pages == managed
    m.validate()


def test_one_that_deflates_when_memory_runs_out_counts_on() -> None:
    m = machine()
    total = mem_total(m)
    made = balloon_on_node_1(m, unmanaged=False)
    made.inflate(300)
    assert mem_total(m) == total
    m.validate()


def test_a_balloon_that_can_moves_its_pages_along() -> None:
    m = machine()
    made = balloon_on_node_1(m)
    made.inflate(300)
    node0 = sum(z.managed_pages for z in m.nodes[0].zones)
    total = mem_total(m)
    m.write(STATE, "offline")
    assert (made.user.pfns(0, 300) < PFN).all()
    assert all_vm_events(m)["balloon_migrate"] == 300
    assert sum(z.managed_pages for z in m.nodes[0].zones) == node0 - 300
    assert mem_total(m) == total - (BLOCK >> 12) + 300 - 300
    m.validate()
    made.deflate(300)
    assert sum(z.managed_pages for z in m.nodes[0].zones) == node0
    m.validate()


def test_each_balloon_counts_its_own_pages_among_those_that_move() -> None:
    m = machine(2)
    policy = new_policy(m, "bind", [1])
    one = balloon_on_node_1(m)
    two = Balloon(m, "two", 1000, unmanaged=False)
    two.user.policy = policy
    anon = User(m, "anon", "anon", 1100, policy=policy, thp="always")
    one.inflate(70)
    anon.grow(1100)
    two.inflate(50)
    pfns = [u.pfns(0, n) for u, n in ((one.user, 70), (two.user, 50), (anon, 1100))]
    at = np.array([*np.concatenate(pfns), 1 << 40], dtype=np.uint64)
    for user, first, last in ((one.user, 0, 70), (two.user, 70, 120)):
        mine = used_by(m.memmap_engine, at, user.engine.number)
        assert np.flatnonzero(mine).tolist() == list(range(first, last))
    managed = [z.managed_pages for z in m.all_zones()]
    m.write(STATE, "offline")
    assert all_vm_events(m)["balloon_migrate"] == 120
    assert sum(managed) - sum(z.managed_pages for z in m.all_zones()) == 32768
    m.validate()


def test_a_balloon_that_is_full_says_so() -> None:
    m = machine()
    made = balloon_on_node_1(m)
    with pytest.raises(KernelError, match="n: 1001") as e:
        made.inflate(1001)
    assert e.value.errno == errno.EINVAL
    made.user.policy = new_policy(m, "bind", [1])
    filler = User(m, "filler", "anon", 40000, policy=new_policy(m, "bind", [1]))
    with pytest.raises(KernelError):
        filler.fault(0, 40000)
    filler.shrink(500)
    drain_all_pages(m)
    with pytest.raises(KernelError) as e:
        made.inflate(1000)
    assert e.value.errno == errno.ENOMEM
    assert made.nr_pages >= 50
    m.validate()


def test_virtio_mem_takes_its_pages_along() -> None:
    m = machine(2)
    total = mem_total(m)
    device = VirtioMem(m, "virtio", 4096)
    anon = User(m, "hog", "anon", 20000, policy=new_policy(m, "bind", [1]), tokens=True)
    device.fake_offline(PFN + 1024, 2048)
    anon.fault(0, 20000)
    anon.write_tokens(0, range(20000))
    assert mem_total(m) == total - 2048
    m.validate()
    report = m.offline_pages_report(32)
    assert report.error is None
    assert report.counts()["offered"] == 2048
    assert device.nr_pages == 0
    assert mem_total(m) == total - (BLOCK >> 12)
    assert (anon.read_tokens(0, 20000) == range(20000)).all()
    m.validate()
    m.write(STATE, "online_movable")
    assert mem_total(m) == total
    m.validate()


def test_virtio_mem_takes_its_references_back_when_the_offline_is_called_off() -> None:
    m = machine()
    device = VirtioMem(m, "virtio", 4096)
    device.fake_offline(PFN + 512, 512)
    held = m.alloc_pages(0, 0x100CCA, 1)
    m.validate()
    before = dump(m)
    with pytest.raises(KernelError) as e:
        m.write(STATE, "offline")
    assert e.value.errno == errno.EINTR
    assert settled_differences(before, dump(m)) == []
    assert device.nr_pages == 512
    m.validate()
    device.fake_online(PFN + 512, 512)
    assert device.nr_pages == 0
    m.free_pages(held)
    m.write(STATE, "offline")
    m.validate()


@pytest.mark.parametrize("priority", [-5, 5])
def test_a_veto_before_or_behind_virtio_mem(priority: int) -> None:
    m = machine()
    device = VirtioMem(m, "virtio", 4096)
    device.fake_offline(PFN, 512)
    veto = MemoryNotifier("veto", lambda m, action, arg: -16 if action == 2 else 0, priority)
    register_memory_notifier(m, veto)
    before = dump(m)
    with pytest.raises(KernelError, match="refused by veto"):
        m.write(STATE, "offline")
    assert settled_differences(before, dump(m)) == []
    m.validate()
    unregister_memory_notifier(m, veto)
    device.close()
    m.write(STATE, "offline")
    m.validate()


def test_what_virtio_mem_does_not_take() -> None:
    m = machine()
    device = VirtioMem(m, "virtio", 1024)
    held = m.alloc_pages_bulk(2000, 0, 0x100CCA, 1)
    for args, code in (
        ((PFN, 100), errno.EINVAL),
        ((PFN + 1, 512), errno.EINVAL),
        ((PFN, 2048), errno.EINVAL),
        ((0x4000000, 512), errno.EINVAL),
        ((int(held[0]) // 512 * 512, 512), errno.EBUSY),
    ):
        before = dump(m)
        with pytest.raises(KernelError) as e:
            device.fake_offline(*args)
        assert e.value.errno == code, args
        assert settled_differences(before, dump(m)) == []
    with pytest.raises(KernelError, match="pfn"):
        device.fake_online(PFN, 512)
    m.validate()


def test_a_driver_may_refuse_to_move_its_pages_and_still_give_them_back() -> None:
    m = two_nodes("memhp_default_state=online_movable")
    m.plug("a", 1, DIMM, 128 << 20)
    driver = Balloon(m, "balloon", 20)
    driver.user.policy = new_policy(m, "bind", [1])
    driver.inflate(10)
    driver.refuse()
    assert driver.inflate(5) == 5
    assert driver.deflate(7) == 7
    m.validate()
    said = m.explain_offline(32)
    assert {(o.kind, o.user, o.errno) for o in said.obstacles} == {("driver", "balloon", 4)}
    assert sum(o.nr_pages for o in said.obstacles) == driver.nr_pages == 8
    driver.refuse(False)
    assert m.offline_pages_report(32).counts()["migrated"] == 8
    driver.refuse()
    driver.close()
    m.validate()
    held = Balloon(m, "held", 5, movable=False)
    with pytest.raises(KernelError, match="'held': movable: False; allowed: True"):
        held.refuse()


@pytest.mark.parametrize("virtio_mem", [False, True])
def test_pages_of_a_driver_come_and_go_through_it_alone(virtio_mem: bool) -> None:
    m = machine()
    made: Balloon
    if virtio_mem:
        device = made = VirtioMem(m, "balloon", 1024)
        device.fake_offline(PFN, 512)
    else:
        made = balloon_on_node_1(m)
        made.inflate(300)
    had = made.nr_pages
    total, managed = mem_total(m), m.nodes[1].zone(3).managed_pages
    for misuse, name in (
        (lambda: made.user.release(0, 1), "release"),
        (lambda: made.user.shrink(1), "release"),
        (made.user.close, "release"),
        (lambda: made.user.grow(1), "fault"),
    ):
        with pytest.raises(KernelError, match=f"{name}: 'balloon'; allowed: users that no"):
            misuse()
        assert (made.nr_pages, mem_total(m)) == (had, total)
        assert m.nodes[1].zone(3).managed_pages == managed
        m.validate()
    made.close()
    assert "balloon" not in m.users
    assert mem_total(m) == total + had
    m.validate()
