"""What the command line wants of huge pages, and what a real machine's files tell of them."""

from __future__ import annotations

import pytest

from kmm import Machine
from kmm.hugetlb_init import memparse
from kmm.replay import snapshot_files
from tests.conftest import two_nodes
from tests.huge import counts, machine, set_pool

G2M, G1G = "2048kB", "1048576kB"


def pools(m: Machine) -> dict[str, int]:
    return {h.name.removeprefix("hugepages-"): h.nr_huge_pages for h in m.hstates}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2M", 2 << 20),
        ("1g", 1 << 30),
        ("0x800K", 2 << 20),
        ("010", 8),
        ("x", 0),
        ("2097152", 2 << 20),
    ],
)
def test_memparse(text: str, size: int) -> None:
    assert memparse(text) == size


@pytest.mark.parametrize(
    ("cmdline", "small", "default"),
    [
        ("", 0, G2M),
        ("hugepages=5", 5, G2M),
        ("hugepagesz=2M hugepages=5", 5, G2M),
        ("hugepages=3 hugepagesz=2M hugepages=5", 5, G2M),
        ("hugepagesz=2M hugepages=5 hugepagesz=2M hugepages=7", 5, G2M),
        ("hugepages=5 hugepages=6", 5, G2M),
        ("hugepagesz=4M hugepages=5", 0, G2M),
        ("hugepagesz=4M hugepages=5 hugepages=6", 6, G2M),
        ("default_hugepagesz=1G hugepagesz=2M hugepages=4", 4, G1G),
        ("default_hugepagesz=2M hugepages=4", 4, G2M),
        ("default_hugepagesz=2M default_hugepagesz=1G", 0, G2M),
        ("hugepages=0:3", 3, G2M),
        ("hugepages=1:3", 0, G2M),
        ("hugepages=many", 0, G2M),
        ("hugepages=", 0, G2M),
    ],
)
def test_parameters(cmdline: str, small: int, default: str) -> None:
    m = two_nodes(cmdline)
    assert pools(m)[G2M] == small
    assert m.default_hstate.name.endswith(default)
    assert m.hstates[1].max_huge_pages == small
    m.validate()


@pytest.mark.parametrize(
    ("cmdline", "line"),
    [
        ("hugepagesz=4M", "HugeTLB: unsupported hugepagesz=4M"),
        ("default_hugepagesz=3M", "HugeTLB: unsupported default_hugepagesz=3M"),
        (
            "hugepagesz=4M hugepages=5",
            "HugeTLB: hugepages=5 does not follow a valid hugepagesz, ignoring",
        ),
        ("hugepagesz=2M hugepagesz=2M", "HugeTLB: hugepagesz=2M specified twice, ignoring"),
        ("hugepages=7:3", "HugeTLB: Invalid hugepages parameter 7:3"),
        (
            "hugepages=1 hugepages=2",
            "HugeTLB: hugepages= specified twice without interleaving hugepagesz=, "
            "ignoring hugepages=2",
        ),
        (
            "hugepagesz=1G hugepages=1",
            "HugeTLB: allocating 1 of page size 1.00 GiB failed.  Only allocated 0 hugepages.",
        ),
    ],
)
def test_messages(cmdline: str, line: str) -> None:
    m = two_nodes(cmdline)
    assert line in m.log
    m.validate()


def test_more_than_there_is_memory_for() -> None:
    m = two_nodes("hugepages=100000")
    got = m.default_hstate.nr_huge_pages
    assert 300 < got < 512
    assert m.default_hstate.max_huge_pages == got
    line = (
        f"HugeTLB: allocating 100000 of page size 2.00 MiB failed.  Only allocated {got} hugepages."
    )
    assert line in m.log
    m.validate()


def test_a_gigantic_page_at_boot() -> None:
    m = two_nodes(
        "hugepagesz=1G hugepages=1", memory="8G", nodes=[{"cpus": "0-1", "memory": "8G"}, {}]
    )
    assert pools(m) == {G2M: 0, G1G: 1}
    m.validate()


def test_cpus_without_such_pages_have_no_pool_of_them() -> None:
    m = two_nodes("default_hugepagesz=1G", pdpe1gb=False)
    assert pools(m) == {G2M: 0}
    assert "HugeTLB: unsupported default_hugepagesz=1G" in m.log
    assert m.listdir("/sys/kernel/mm/hugepages") == ["hugepages-2048kB"]
    m.validate()


def test_files_tell_what_pools_have() -> None:
    first = machine(cmdline="hugepages=9")
    set_pool(first, 9, 0)
    files = snapshot_files(first)
    assert first.default_hstate.nr_huge_pages_node[0] == 9
    text = files["/proc/meminfo"].replace("HugePages_Rsvd:        0", "HugePages_Rsvd:        2")
    node = "/sys/devices/system/node/node0/meminfo"
    used = files[node].replace("HugePages_Free:      9", "HugePages_Free:      6")
    used = used.replace("HugePages_Surp:      0", "HugePages_Surp:      1")
    assert text != files["/proc/meminfo"]
    m = Machine.from_files({**files, "/proc/meminfo": text, node: used}, first.config)
    assert counts(m.default_hstate) == (9, 6, 2, 1)
    user = m.users["hugetlb since before"]
    assert (user.pages, user.nr_present) == (5, 3)
    m.validate()
    set_pool(m, 0)
    # Three that are no surplus went; of the other six all are too many.
    assert counts(m.default_hstate) == (6, 3, 2, 6)
    user.close()
    # One that nobody had reserved stays until the pool's size is written again.
    assert counts(m.default_hstate) == (1, 1, 0, 1)
    m.validate()
