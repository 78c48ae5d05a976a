"""Whether a block could go: the verdict, and what a real attempt then does."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kmm import KernelError, Machine
from kmm.balloon_compaction import Balloon
from kmm.gup import Pin
from kmm.memory import User
from kmm.memory_block import MemoryNotifier, register_memory_notifier
from kmm.mempolicy import new_policy
from kmm.snapshot import differences, dump
from kmm.virtio_mem import VirtioMem
from tests.conftest import DIMM, two_nodes

BLOCK = 128 << 20
PFN = DIMM >> 12
STATE = "/sys/devices/system/memory/memory%d/state"
ERRNOS = (-errno.EBUSY, -errno.EPERM, -errno.ENOMEM)


def machine(kind: str = "movable", blocks: int = 2, node: int = 1, **more: Any) -> Machine:
    m = two_nodes(f"memhp_default_state=online_{kind}", **more)
    m.plug("a", node, DIMM, blocks * BLOCK)
    return m


def user(m: Machine, name: str, kind: str, pages: int, node: int, **more: Any) -> User:
    made = User(m, name, kind, pages, policy=new_policy(m, "bind", [node]), **more)
    try:
        made.fault(0, pages)
    except KernelError:
        pass
    return made


def leave_free(m: Machine, node: int, pages: int) -> User:
    """Let the kernel take a node's memory but for so many pages above the marks."""
    filler = User(m, "filler", "kernel", m.totalram_pages, policy=new_policy(m, "bind", [node]))
    with pytest.raises(KernelError):
        filler.fault(0, filler.pages)
    filler.shrink(pages)
    return filler


class Veto:
    """A notifier that refuses blocks to go, and can be asked."""

    def __init__(self, m: Machine, code: int) -> None:
        self.code = code
        register_memory_notifier(m, MemoryNotifier("veto", self.call, 5, asks=self.asks))

    def asks(self, m: Machine, arg: Any) -> int:
        return self.code

    def call(self, m: Machine, action: int, arg: Any) -> int:
        return self.code if action == 2 else 0


# -- agreement --------------------------------------------------------------------------------

KINDS = ["anon", "shmem", "file", "slab", "slab_reclaimable", "stack", "page_table", "kernel"]
USERS = st.lists(
    st.tuples(
        st.sampled_from([*KINDS, "driver_movable", "offline"]),
        st.integers(1, 3000),
        st.integers(0, 1),  # node
        st.booleans(),  # huge pages, or larger blocks
        st.booleans(),  # mlocked, or mapped
    ),
    max_size=5,
)
DEEDS = st.lists(
    st.tuples(
        st.sampled_from(
            ["pin", "short", "hard", "soft", "balloon", "held", "virtio", "release", "raw", "signal"]
        ),
        st.integers(0, 1 << 20),
        st.integers(1, 2000),
    ),
    max_size=6,
)


class Life:
    """A machine and what happens to it before somebody asks."""

    def __init__(self, kinds: list[str], single: bool) -> None:
        self.m = m = two_nodes("memhp_default_state=offline")
        self.node = 0 if single else 1
        m.plug("a", self.node, DIMM, len(kinds) * BLOCK)
        for i, kind in enumerate(kinds):
            m.write(STATE % (32 + i), f"online_{kind}")
        self.blocks = list(range(32, 32 + len(kinds)))
        self.users: list[User] = []
        self.pins: list[Pin] = []

    def populate(self, users: list[tuple[str, int, int, bool, bool]]) -> None:
        for i, (kind, pages, node, large, marked) in enumerate(users):
            on_lru = kind in ("anon", "shmem", "file")
            more: dict[str, Any] = {}
            if large and on_lru:
                more["thp"] = "madvise"
            elif large and kind != "driver_movable":
                more["order"] = 3
                pages = pages // 8 + 1
            where = node if node in self.m.n_memory else 0
            made = User(self.m, f"u{i}", kind, pages, **more)
            made.policy = new_policy(self.m, "preferred", [where])
            made.engine.locked = marked and on_lru
            self.try_(made.fault, 0, pages)
            self.users.append(made)

    def try_(self, act: Any, *args: Any) -> None:
        try:
            act(*args)
        except KernelError:
            pass  # what was asked for could not be: that too may happen

    def do(self, deed: str, where: int, n: int) -> None:
        m = self.m
        pfn = PFN + where % (len(self.blocks) * 32768)
        if deed in ("pin", "short"):
            self._pin(where, deed == "pin")
        elif deed in ("hard", "soft"):
            used = [u.pfns() for u in self.users if u.nr_present]
            if used and where % 3:
                there = used[where % len(used)]
                pfn = int(there[there >= 0][where % int((there >= 0).sum())])
            self.try_(m.write, f"/sys/devices/system/memory/{deed}_offline_page", hex(pfn << 12))
        elif deed in ("balloon", "held"):
            if deed not in m.users:
                balloon = Balloon(m, deed, n, movable=deed == "balloon")
                balloon.user.policy = new_policy(m, "preferred", [self.node])
                self.try_(balloon.inflate, n)
        elif deed == "virtio":
            if "virtio" not in m.users:
                device = VirtioMem(m, "virtio", 4096)
                self.try_(device.fake_offline, pfn // 512 * 512, n % 4 * 512 + 512)
        elif deed == "release" and self.users:
            chosen = self.users[where % len(self.users)]
            start = where % (chosen.pages + 1)
            chosen.release(start, min(n, chosen.pages - start))
        elif deed == "raw":
            gfp = (0x100CCA, 0xCC0)[where % 2]
            m.alloc_pages_bulk(n % 40, where % 11, gfp, self.node)
        elif deed == "signal":
            m.signal_pending = where % 2 == 0

    def _pin(self, where: int, long_term: bool) -> None:
        can = [u for u in self.users if u.kind <= 3 and u.pages]
        if can:
            chosen = can[where % len(can)]
            try:
                self.pins.append(self.m.pin(chosen, where % chosen.pages, long_term))
            except KernelError:
                pass


def ask_and_try(m: Machine, block: int) -> tuple[bool, bool]:
    """Ask about a block and then try; whether it went, and whether nothing was left to chance."""
    before = dump(m)
    said = m.explain_offline(block)
    assert differences(before, dump(m)) == []
    sure = said.room is None or not said.room.sure < said.nr_to_move <= said.room.most
    try:
        m.write(STATE % block, "offline")
    except KernelError as e:
        assert not said.can_go or not sure, (block, str(e), said.as_dict()["goes_along"])
        nowhere = any(o.kind == "nowhere to go" for o in said.obstacles)
        if said.obstacles and not nowhere:
            assert e.errno == said.errno, (str(e), said.obstacles[0])
        if e.reason == "failure to isolate range":
            assert e.pfn == said.obstacles[0].pfn
        return False, sure
    assert said.can_go, said.obstacles[0]
    return True, sure


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from(["movable", "kernel"]), min_size=1, max_size=3),
    st.booleans(),
    USERS,
    DEEDS,
    st.none() | st.integers(0, 6000),
    st.none() | st.sampled_from(ERRNOS),
)
def test_the_verdict_and_the_attempt_agree(
    kinds: list[str], single: bool, users: Any, deeds: Any, left: int | None, veto: int | None
) -> None:
    life = Life(kinds, single)
    life.populate(users)
    for deed in deeds:
        life.do(*deed)
    if left is not None:
        leave_free(life.m, 0, left)
    if veto is not None:
        Veto(life.m, veto)
    life.m.validate()
    for block in life.blocks:
        ask_and_try(life.m, block)
        life.m.validate()
    for pin in life.pins:
        life.m.unpin(pin)
    life.m.validate()
