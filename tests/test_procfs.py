"""The texts of /proc, beyond what recordings show."""

from __future__ import annotations

import re

import pytest

from kmm import Machine, procfs
from kmm.replay import replay
from tests.conftest import DIMM, recording


def test_kpageflags_ends_with_the_section_of_the_last_page(m: Machine) -> None:
    end = m.max_pfn + 0x20
    assert end == 1 << 18
    everything = procfs.kpageflags(m, 0, 1 << 34)
    assert sum(n for n, _ in everything) == end
    assert procfs.kpageflags(m, end, 5) == []
    assert procfs.kpageflags(m, end - 5, 0) == []
    m.plug("a", 1, DIMM, 128 << 20)
    assert sum(n for n, _ in procfs.kpageflags(m, 0, 1 << 34)) == (DIMM >> 12) + 32768
    m.validate()


def test_kpageflags_read_in_parts_is_the_same(m: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = procfs.kpageflags(m, 3, 200_000)
    monkeypatch.setattr(procfs, "KPAGEFLAGS_RUNS", 1)
    assert procfs.kpageflags(m, 3, 200_000) == whole
    m.validate()


@pytest.mark.parametrize(
    "name", ["kernel_zone", "four_nodes", "random_3_gib", "early_blocks_4_gib"]
)
def test_the_direct_map_is_that_of_the_recorded_machine(name: str) -> None:
    """All RAM, online or not, and the hole below 1 MiB; the kernel splits large pages at times."""
    data = recording(name)
    first = int(direct_map(data["steps"][0]["files"]["/proc/meminfo"])[0])
    compared = 0
    for real, model in zip(data["steps"], replay(data)["steps"], strict=True):
        if "files" in real:
            want = direct_map(real["files"]["/proc/meminfo"])
            have = direct_map(model["files"]["/proc/meminfo"])
            assert sum(map(int, have)) == sum(map(int, want))
            if int(want[0]) == first:
                assert have == want
                compared += 1
    assert compared > 1


def direct_map(meminfo: str) -> list[str]:
    return re.findall(r"^DirectMap(?:4k|2M): +(\d+) kB$", meminfo, re.M)


def test_ram_that_ends_inside_two_mib_is_mapped_by_small_pages(m: Machine) -> None:
    assert direct_map(m.read("/proc/meminfo")) == ["1920", str(1046528)]
    m.plug("a", 1, DIMM, 128 << 20)
    assert direct_map(m.read("/proc/meminfo")) == ["1920", str(1046528 + (128 << 10))]
    m.unplug("a")
    assert direct_map(m.read("/proc/meminfo")) == ["1920", str(1046528)]
