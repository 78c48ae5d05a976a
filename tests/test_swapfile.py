"""What does not fit into memory goes to the swap device and comes back as it was."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from kmm import ConfigError, KernelError, Machine
from kmm.memory import User
from kmm.vmstat import all_node_items, all_vm_events
from tests.conftest import two_nodes

MIB = 1 << 20


def filled(m: Machine, kind: str = "anon", pages: int = 320_000, thp: str = "never") -> User:
    user = User(m, "u", kind, pages, tokens=True, thp=thp)
    step = 16384
    for start in range(0, pages, step):
        n = min(step, pages - start)
        user.fault(start, n)
        user.write_tokens(start, np.arange(start, start + n) + 1)
    return user


def holds(user: User) -> bool:
    return bool((user.read_tokens(0, user.pages) == np.arange(user.pages) + 1).all())


@pytest.mark.parametrize("kind", ["anon", "shmem"])
def test_more_than_memory_is_written_and_read_back(kind: str) -> None:
    m = two_nodes(swap="1G")
    user = filled(m, kind)
    events = all_vm_events(m)
    assert user.nr_present + user.engine.nr_swapped == 320_000
    assert events["pswpout"] == user.engine.nr_swapped > 80_000
    assert all_node_items(m)["nr_vmscan_write"] == events["pswpout"]
    assert holds(user)
    m.validate()
    user.read(0, user.pages)
    assert holds(user)
    events = all_vm_events(m)
    assert events["pswpout"] - events["pswpin"] == user.engine.nr_swapped
    assert events["pgmajfault"] == (events["pswpin"] if kind == "anon" else 0)
    m.validate()
    swap = m.swap
    assert swap is not None
    user.release(0, user.pages)
    assert swap.device.nr_used == 0
    assert not swap.device.owner.any()
    m.validate()


def test_huge_pages_go_whole_or_in_parts() -> None:
    m = two_nodes(swap="1G")
    user = filled(m, pages=300_032, thp="always")
    events = all_vm_events(m)
    assert events["thp_swpout"] > 100
    assert events["thp_swpout_fallback"] == 0
    assert holds(user)
    m.validate()
    user.read(0, user.pages)
    assert holds(user)
    m.validate()


def test_huge_pages_are_split_where_no_whole_cluster_is_free() -> None:
    m = two_nodes(swap=4 * MIB)  # of its two clusters one has the header
    user = User(m, "u", "anon", 250_368, thp="always", tokens=True)
    user.oom_score_adj = -1000
    with pytest.raises(KernelError):
        user.fault(0, user.pages)
    events = all_vm_events(m)
    assert events["thp_swpout"] == 1
    assert events["thp_swpout_fallback"] > 0
    assert user.engine.nr_swapped == 1023
    m.validate()


def test_a_full_device_leaves_anonymous_pages_alone() -> None:
    m = two_nodes(swap=64 * MIB)
    user = User(m, "u", "anon", 400_000, tokens=True)
    user.oom_score_adj = -1000
    with pytest.raises(KernelError) as e:
        user.fault(0, 400_000)
    assert e.value.errno == errno.ENOMEM
    assert user.engine.nr_swapped == 64 * MIB // 4096 - 1
    assert "SwapFree:              0 kB" in m.read("/proc/meminfo")
    m.validate()


def test_what_is_shown_of_the_device() -> None:
    m = two_nodes()
    assert m.read("/proc/swaps") == "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    assert "SwapTotal:             0 kB" in m.read("/proc/meminfo")
    before = m.read("/proc/meminfo").split("CommitLimit:")[1].split()[0]
    m.swapon(MIB)
    assert m.log[-1] == (
        "Adding 1020k swap on /dev/pmem0.  Priority:-2 extents:1 across:1020k SSFS"
    )
    assert m.read("/proc/swaps").splitlines()[1] == (
        "/dev/pmem0" + " " * 30 + "partition\t1020\t\t0\t\t-2"
    )
    meminfo = m.read("/proc/meminfo")
    assert "SwapTotal:          1020 kB" in meminfo
    assert "SwapFree:           1020 kB" in meminfo
    assert "SwapCached:            0 kB" in meminfo
    assert int(meminfo.split("CommitLimit:")[1].split()[0]) == int(before) + 1020
    with pytest.raises(KernelError) as e:
        m.swapon(MIB)
    assert e.value.errno == errno.EBUSY
    m.validate()


@pytest.mark.parametrize("size", [-1, 4096, 8191, 1 << 60, "1M"])
def test_a_bad_size_is_named(m: Machine, size: object) -> None:
    with pytest.raises(KernelError, match="size"):
        m.swapon(size)  # type: ignore[arg-type]
    assert m.swap is None


@pytest.mark.parametrize("size", [-1, 4096, "65T", "much", None])
def test_a_bad_size_of_a_description_is_named(size: object) -> None:
    with pytest.raises(ConfigError, match=r"machine\.swap"):
        two_nodes(swap=size)


def test_a_host_without_memory_for_its_table_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    m = two_nodes()
    monkeypatch.setattr("kmm.swapfile.SwapDevice", fail)
    with pytest.raises(KernelError, match="size: 70368744177664; this host lacks") as e:
        m.swapon(1 << 46)
    assert e.value.errno == errno.ENOMEM
    assert m.swap is None
    m.validate()
    with pytest.raises(ConfigError, match=r"machine\.swap: 70368744177664; this host lacks"):
        two_nodes(swap="64T")
