"""The files of huge page pools show the pools, and refuse what the kernel refuses."""

from __future__ import annotations

import errno

import pytest

from kmm import KernelError, Machine
from kmm.hugetlbfs import HugetlbUser
from kmm.mempolicy import MemPolicy
from kmm.snapshot import dump
from kmm.sysfs_hugetlb import nr_hugepages_store
from tests.huge import GIB1, NODE_POOL, POOL, counts, machine, set_pool


@pytest.fixture(scope="module")
def shared() -> Machine:
    return machine()


def test_directories(shared: Machine) -> None:
    names = ["free_hugepages", "nr_hugepages", "surplus_hugepages"]
    all_names = sorted(
        [*names, "nr_hugepages_mempolicy", "nr_overcommit_hugepages", "resv_hugepages"]
    )
    base = "/sys/kernel/mm/hugepages"
    assert shared.listdir(base) == ["hugepages-1048576kB", "hugepages-2048kB"]
    assert shared.listdir(f"{base}/hugepages-2048kB") == all_names
    more = ["demote", "demote_size"]
    assert shared.listdir(f"{base}/hugepages-1048576kB") == sorted([*all_names, *more])
    for nid in (0, 1):
        node = f"/sys/devices/system/node/node{nid}"
        assert "hugepages" in shared.listdir(node)
        assert shared.listdir(f"{node}/hugepages") == shared.listdir(base)
        assert shared.listdir(f"{node}/hugepages/hugepages-2048kB") == names
        assert shared.listdir(f"{node}/hugepages/hugepages-1048576kB") == sorted([*names, *more])
    assert shared.read(f"{base}/hugepages-1048576kB/demote_size") == "2048kB\n"
    sysctls = {"hugetlb_shm_group", "nr_hugepages", "nr_overcommit_hugepages"}
    assert sysctls <= set(shared.listdir("/proc/sys/vm"))


@pytest.mark.parametrize(
    ("path", "value", "code"),
    [
        (POOL % (2048, "nr_hugepages"), "x", errno.EINVAL),
        (POOL % (2048, "nr_hugepages"), "-1", errno.EINVAL),
        (POOL % (2048, "nr_hugepages"), " 4", errno.EINVAL),
        (POOL % (2048, "nr_hugepages"), "0x2", errno.EINVAL),
        (POOL % (2048, "nr_hugepages"), "", errno.EINVAL),
        (POOL % (2048, "nr_hugepages"), "18446744073709551616", errno.ERANGE),
        (POOL % (2048, "nr_hugepages"), "9" * 5000, errno.ERANGE),
        (POOL % (2048, "free_hugepages"), "1", errno.EACCES),
        (POOL % (2048, "resv_hugepages"), "1", errno.EACCES),
        (POOL % (2048, "demote"), "1", errno.EACCES),
        (POOL % (4096, "nr_hugepages"), "1", errno.ENOENT),
        (POOL % (1 << 20, "nr_overcommit_hugepages"), "1", errno.EINVAL),
        (POOL % (1 << 20, "nr_overcommit_hugepages"), "x", errno.EINVAL),
        (POOL % (1 << 20, "demote_size"), "1G", errno.EINVAL),
        (POOL % (1 << 20, "demote_size"), "64K", errno.EINVAL),
        (POOL % (1 << 20, "demote"), "x", errno.EINVAL),
        (NODE_POOL % (1, 2048, "nr_hugepages"), "x", errno.EINVAL),
        (NODE_POOL % (1, 2048, "surplus_hugepages"), "1", errno.EACCES),
        (NODE_POOL % (5, 2048, "nr_hugepages"), "1", errno.ENOENT),
        ("/proc/sys/vm/nr_hugepages", "-3", errno.EINVAL),
        ("/proc/sys/vm/nr_hugepages", "x", errno.EINVAL),
        ("/proc/sys/vm/nr_hugepages", "", errno.EINVAL),
        ("/proc/sys/vm/nr_overcommit_hugepages", "-1", errno.EINVAL),
        ("/proc/sys/vm/hugetlb_shm_group", "5000000000", errno.EINVAL),
    ],
)
def test_refused(shared: Machine, path: str, value: str, code: int) -> None:
    before = dump(shared)
    with pytest.raises(KernelError) as e:
        shared.write(path, value)
    assert e.value.errno == code
    assert dump(shared) == before


def test_counts_are_shown_everywhere() -> None:
    m = machine()
    m.write(POOL % (2048, "nr_hugepages"), "+10")
    user = HugetlbUser(m, "file", 4)
    user.fault(0, 1)
    set_pool(m, 3)
    have = {
        name: m.read(POOL % (2048, name)).strip()
        for name in m.listdir("/sys/kernel/mm/hugepages/hugepages-2048kB")
    }
    assert have == {
        "free_hugepages": "3",
        "nr_hugepages": "4",
        "nr_hugepages_mempolicy": "4",
        "nr_overcommit_hugepages": "0",
        "resv_hugepages": "3",
        "surplus_hugepages": "1",
    }
    assert [ln.split() for ln in m.read("/proc/meminfo").splitlines() if "Huge" in ln][3:] == [
        ["HugePages_Total:", "4"],
        ["HugePages_Free:", "3"],
        ["HugePages_Rsvd:", "3"],
        ["HugePages_Surp:", "1"],
        ["Hugepagesize:", "2048", "kB"],
        ["Hugetlb:", "8192", "kB"],
    ]
    h = m.default_hstate
    for nid in (0, 1):
        text = m.read(f"/sys/devices/system/node/node{nid}/meminfo")
        assert f"Node {nid} HugePages_Total: {h.nr_huge_pages_node[nid]:5}\n" in text
        assert f"Node {nid} HugePages_Free:  {len(h.free[nid]):5}\n" in text
        assert f"Node {nid} HugePages_Surp:  {h.surplus_huge_pages_node[nid]:5}\n" in text
    assert m.read("/proc/sys/vm/nr_hugepages") == "3\n"
    m.validate()


def test_proc_takes_numbers_of_any_base() -> None:
    m = machine()
    m.write("/proc/sys/vm/nr_hugepages", "0x3")
    assert m.read("/proc/sys/vm/nr_hugepages") == "3\n"
    m.write("/proc/sys/vm/nr_hugepages_mempolicy", "010")
    assert m.read(POOL % (2048, "nr_hugepages")) == "8\n"
    m.write("/proc/sys/vm/hugetlb_shm_group", "-5")
    assert m.read("/proc/sys/vm/hugetlb_shm_group") == "-5\n"
    m.write("/proc/sys/vm/nr_overcommit_hugepages", "12")
    assert m.read(POOL % (2048, "nr_overcommit_hugepages")) == "12\n"
    m.validate()


@pytest.mark.parametrize(
    ("policy", "nodes"),
    [
        (MemPolicy("bind", (1,)), {0: 0, 1: 6}),
        (MemPolicy("preferred", (1,)), {0: 0, 1: 6}),
        (MemPolicy("preferred"), {0: 6, 1: 0}),
        (MemPolicy("interleave", (0, 1)), {0: 3, 1: 3}),
        (MemPolicy(), {0: 3, 1: 3}),
    ],
)
def test_the_policy_of_who_writes_says_which_nodes_take_part(
    policy: MemPolicy, nodes: dict[int, int]
) -> None:
    m = machine()
    nr_hugepages_store(m, m.default_hstate, 6, policy=policy)
    assert m.default_hstate.nr_huge_pages_node == nodes
    m.validate()


def test_gigantic_pools_through_files() -> None:
    m = machine("kernel", 2 * GIB1)
    m.write(NODE_POOL % (1, 1 << 20, "nr_hugepages"), "2")
    assert m.read(NODE_POOL % (1, 1 << 20, "free_hugepages")) == "2\n"
    assert "Hugetlb:         2097152 kB\n" in m.read("/proc/meminfo")
    m.write(POOL % (1 << 20, "demote"), "1")
    assert m.read(POOL % (2048, "nr_hugepages")) == "512\n"
    m.write(POOL % (1 << 20, "nr_hugepages"), "0")
    m.write(POOL % (2048, "nr_hugepages"), "0")
    assert [counts(h) for h in m.hstates] == [(0, 0, 0, 0)] * 2
    m.validate()
