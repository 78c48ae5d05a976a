"""The tunables: defaults, limits, and what a write sets off."""

from __future__ import annotations

import pytest

from kmm import KernelError, Machine

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
    ],
)
def test_values(m: Machine, name: str, default: str, good: str, bad: str) -> None:
    assert m.read(VM + name) == default + "\n"
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
