"""References that outlive users."""

from __future__ import annotations

import contextlib

from kmm import KernelError, _page_ref
from kmm.gfp import GFP_USER
from kmm.memory import User
from tests.conftest import DIMM, two_nodes


def test_one_rule_says_who_is_pinned_without_a_user() -> None:
    m = two_nodes("memhp_default_state=online_kernel")
    m.plug("a", 1, DIMM, 128 << 20)
    made = User(m, "hog", "anon", 2)
    made.fault(0, 2)
    pins = [m.pin(made, index) for index in range(2)]
    first, second = made.pfns().tolist()
    assert not _page_ref.is_orphan(m.memmap_engine, first)  # it has its user
    with contextlib.suppress(KernelError):
        made.close()
    assert _page_ref.is_orphan(m.memmap_engine, first)
    assert _page_ref.is_orphan(m.memmap_engine, second)
    # What is broken has left its list.
    with contextlib.suppress(KernelError):
        m.write("/sys/devices/system/memory/hard_offline_page", hex(second << 12))
    assert second in m.hwpoison
    assert not _page_ref.is_orphan(m.memmap_engine, second)
    m.unpin(pins[0])
    assert not _page_ref.is_orphan(m.memmap_engine, first)
    free = m.alloc_pages(0, GFP_USER)
    assert not _page_ref.is_orphan(m.memmap_engine, free)
    m.validate()
