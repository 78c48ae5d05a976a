"""The tunables: defaults, limits, and what a write sets off."""

from __future__ import annotations

import pytest

from kmm import KernelError, Machine
from kmm.watermarks import global_dirty_limits

VM = "/proc/sys/vm/"


@pytest.mark.parametrize(
    ("name", "default", "good", "bad"),
    [
        ("watermark_scale_factor", "10", "3000", "3001"),
        ("watermark_boost_factor", "15000", "0", "-1"),
        ("percpu_pagelist_high_fraction", "0", "8", "7"),
        ("swappiness", "60", "200", "201"),
        ("zone_reclaim_mode", "0", "1", "x"),
        ("dirty_ratio", "20", "40", "101"),
        ("compaction_proactiveness", "20", "0", "101"),
        ("overcommit_memory", "0", "2", "3"),
        ("overcommit_ratio", "50", "-1", "2147483648"),
        ("overcommit_kbytes", "0", "9223372036854775808", "-1"),
        ("user_reserve_kbytes", None, "4294967296", "18446744073709551616"),
        ("dirty_writeback_centisecs", "500", "-1", "2147483648"),
        ("laptop_mode", "0", "-1", "2147483647"),
        ("stat_interval", "1", "65536", "2147483647"),
        ("max_map_count", "65530", "0", "-1"),
        ("mmap_rnd_bits", "28", "32", "33"),
        ("mmap_rnd_compat_bits", "8", "16", "7"),
        ("mmap_min_addr", "65536", "4294967296", "abc"),
        ("page-cluster", "3", "101", "-1"),
        ("memory_failure_recovery", "1", "0", "2"),
        ("unprivileged_userfaultfd", "0", "1", "2"),
    ],
)
def test_values(m: Machine, name: str, default: str | None, good: str, bad: str) -> None:
    assert default is None or m.read(VM + name) == default + "\n"
    m.write(VM + name, good)
    assert m.read(VM + name) == good + "\n"
    with pytest.raises(KernelError, match="EINVAL"):
        m.write(VM + name, bad)
    assert m.read(VM + name) == good + "\n"
    m.validate()


@pytest.mark.parametrize(
    ("text", "value"), [("0x100", 256), ("5000 7", 5000), (" 7000", 7000), ("010", 8)]
)
def test_numbers_are_read_as_the_kernel_does(m: Machine, text: str, value: int) -> None:
    m.write(VM + "min_free_kbytes", text)
    assert m.vm.min_free_kbytes == value
    m.validate()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("1 2", "1\t2\t32\t0\t0"),
        ("zebra", "256\t256\t32\t0\t0"),
        ("-5 64 32", "0\t64\t32\t0\t0"),
        ("256 100 x", "256\t100\t32\t0\t0"),
        ("1 2 3 4 5 6 7", "1\t2\t3\t4\t5"),
    ],
)
def test_reserve_ratios_take_what_can_be_parsed(m: Machine, text: str, shown: str) -> None:
    m.write(VM + "lowmem_reserve_ratio", text)
    assert m.read(VM + "lowmem_reserve_ratio") == shown + "\n"
    m.validate()


def test_the_share_of_per_cpu_lists(m: Machine) -> None:
    m.write(VM + "percpu_pagelist_high_fraction", "8")
    zone = m.nodes[0].zone(1)
    assert zone.pcp_state(0)[1] == zone.managed_pages // 8 // 2
    m.validate()


def test_the_dirty_ratio_moves_the_ratelimit(m: Machine) -> None:
    before = m.ratelimit_pages
    m.write(VM + "dirty_ratio", "40")
    assert abs(m.ratelimit_pages - 2 * before) <= 1
    m.validate()


def test_huge_pages_off_lowers_min_free(m: Machine) -> None:
    m.write("/sys/kernel/mm/transparent_hugepage/enabled", "never")
    assert m.vm.min_free_kbytes < 10000
    m.write("/sys/kernel/mm/transparent_hugepage/enabled", "always")
    assert m.vm.min_free_kbytes == 45056 or m.vm.min_free_kbytes > 40000
    m.validate()


def test_files_that_only_do_something(m: Machine) -> None:
    for value in ("1", "2", "3", "4"):
        m.write("/proc/sys/vm/drop_caches", value)
    for value in ("0", "5", "x", ""):
        with pytest.raises(KernelError) as e:
            m.write("/proc/sys/vm/drop_caches", value)
        assert e.value.errno == 22
    m.write("/proc/sys/vm/stat_refresh", "1")
    assert m.read("/proc/sys/vm/stat_refresh") == ""
    with pytest.raises(KernelError) as e:
        m.read("/proc/sys/vm/drop_caches")
    assert e.value.errno == 13
    m.validate()


def test_all_files_of_a_real_kernel_are_there(m: Machine) -> None:
    names = m.listdir(VM)
    assert len(names) == 50
    assert {
        "numa_zonelist_order",
        "page-cluster",
        "dirty_bytes",
        "hugetlb_optimize_vmemmap",
    } <= set(names)


def test_bytes_and_ratios_replace_each_other(m: Machine) -> None:
    def shown(*names: str) -> list[str]:
        return [m.read(VM + name).strip() for name in names]

    m.write(VM + "dirty_bytes", "40960001")
    m.write(VM + "dirty_background_bytes", "4096")
    both = ("dirty_bytes", "dirty_ratio", "dirty_background_bytes", "dirty_background_ratio")
    assert shown(*both) == ["40960001", "0", "4096", "0"]
    assert global_dirty_limits(m) == (1, 10001)
    m.write(VM + "dirty_ratio", "0")  # as it is: the bytes stay
    m.write(VM + "dirty_background_ratio", "10")
    assert shown(*both) == ["40960001", "0", "0", "10"]
    m.write(VM + "dirty_ratio", "20")
    assert shown(*both) == ["0", "20", "0", "10"]
    for name, low in (("dirty_bytes", "8191"), ("dirty_background_bytes", "0")):
        for value, code in ((low, "EINVAL"), ("9223372036854775808", "ERANGE"), ("-1", "EINVAL")):
            with pytest.raises(KernelError, match=code):
                m.write(VM + name, value)
    assert shown(*both) == ["0", "20", "0", "10"]
    m.validate()


def test_the_commit_limit(m: Machine) -> None:
    def limit() -> int:
        return int(m.read("/proc/meminfo").split("CommitLimit:")[1].split()[0])

    pages = m.totalram_pages
    assert limit() == pages * 50 // 100 * 4
    m.write(VM + "nr_hugepages", "20")
    assert limit() == (pages - 20 * 512) * 50 // 100 * 4
    m.write(VM + "overcommit_kbytes", "5000")
    assert (limit(), m.read(VM + "overcommit_ratio")) == (5000, "0\n")
    m.write(VM + "overcommit_ratio", "10")
    assert (limit(), m.read(VM + "overcommit_kbytes")) == ((pages - 20 * 512) // 10 * 4, "0\n")
    # A negative share wraps around.
    m.write(VM + "overcommit_ratio", "-5")
    assert limit() == ((1 << 64) - 5 * (pages - 20 * 512)) // 100 * 4
    m.validate()


def test_a_flag_takes_any_number(m: Machine) -> None:
    path = VM + "hugetlb_optimize_vmemmap"
    for value, shown in (("-1", "1"), ("0", "0"), ("9223372036854775808", "1")):
        m.write(path, value)
        assert m.read(path) == shown + "\n"
    m.validate()


def test_numa_items_begin_anew_when_they_are_counted_again(m: Machine) -> None:
    def hits() -> int:
        return int(m.read("/sys/devices/system/node/node0/numastat").split()[1])

    m.free_pages(m.alloc_pages())
    assert hits() > 0
    m.write(VM + "numa_stat", "1")  # as it is
    assert hits() > 0
    m.write(VM + "numa_stat", "0")
    m.free_pages(m.alloc_pages())
    assert hits() == 0
    assert "numa_hit 0\n" in m.read("/proc/vmstat")
    m.write(VM + "numa_stat", "1")
    assert hits() == 0
    m.free_pages(m.alloc_pages())
    assert hits() == 1
    m.validate()


def test_the_order_of_zonelists_is_the_only_one_left(m: Machine) -> None:
    for word in ("Node", "default"):
        m.write(VM + "numa_zonelist_order", word)
    with pytest.raises(KernelError, match="EINVAL"):
        m.write(VM + "numa_zonelist_order", "zone")
    assert m.read(VM + "numa_zonelist_order") == "Node\n"
    assert m.log[-2:] == ["Ignoring unsupported numa_zonelist_order value:  zone", ""]
    m.validate()
