"""The texts of /proc, beyond what recordings show."""

from __future__ import annotations

import pytest

from kmm import Machine, procfs
from tests.conftest import DIMM


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
