"""Whether a block could go: the verdict, and what a real attempt then does."""

from __future__ import annotations

import contextlib
import errno
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kmm import KernelError, Machine
from kmm.balloon_compaction import Balloon
from kmm.cli import main
from kmm.gup import Pin
from kmm.hugetlbfs import HugetlbUser
from kmm.memory import User
from kmm.memory_block import MemoryNotifier, register_memory_notifier
from kmm.mempolicy import new_policy
from kmm.offline_why import why_lines
from kmm.page_alloc import drain_all_pages
from kmm.replay import snapshot_files
from kmm.snapshot import differences, dump
from kmm.virtio_mem import VirtioMem
from tests.conftest import DIMM, RECORDINGS, two_nodes

BLOCK = 128 << 20
PFN = DIMM >> 12
STATE = "/sys/devices/system/memory/memory%d/state"
EXAMPLES = Path(__file__).parent.parent / "examples"
ERRNOS = (-errno.EBUSY, -errno.EPERM, -errno.ENOMEM)


def machine(kind: str = "movable", blocks: int = 2, node: int = 1, **more: Any) -> Machine:
    m = two_nodes(f"memhp_default_state=online_{kind}", **more)
    m.plug("a", node, DIMM, blocks * BLOCK)
    return m


def user(m: Machine, name: str, kind: str, pages: int, node: int, **more: Any) -> User:
    made = User(m, name, kind, pages, policy=new_policy(m, "bind", [node]), **more)
    with contextlib.suppress(KernelError):
        made.fault(0, pages)
    return made


def leave_free(m: Machine, node: int, pages: int) -> User:
    """Let the kernel take a node's memory but for so many pages above the marks."""
    filler = User(m, "filler", "kernel", m.totalram_pages, policy=new_policy(m, "bind", [node]))
    for other in m.users.values():
        other.oom_score_adj = -1000
    before = -1
    while filler.nr_present > before:
        before = filler.nr_present
        with pytest.raises(KernelError):
            filler.fault(0, filler.pages)
        # What CPUs keep would come back to who reclaims something.
        drain_all_pages(m)
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
            [
                "pin",
                "short",
                "hard",
                "soft",
                "balloon",
                "held",
                "virtio",
                "release",
                "raw",
                "signal",
                "pool",
                "map",
                "swap",
                "marks",
            ]
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
            if large and kind == "anon":
                more["thp"] = "madvise"
            elif large and not on_lru and kind != "driver_movable":
                more["order"] = 3
                pages = pages // 8 + 1
            where = node if node in self.m.n_memory else 0
            made = User(self.m, f"u{i}", kind, pages, **more)
            made.policy = new_policy(self.m, "preferred", [where])
            made.engine.locked = marked and on_lru
            self.try_(made.fault, 0, pages)
            self.users.append(made)

    def try_(self, act: Any, *args: Any) -> None:
        with contextlib.suppress(KernelError):  # it may well be refused
            act(*args)

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
        elif deed == "pool":
            path = f"/sys/devices/system/node/node{where % 2 * self.node}/hugepages"
            self.try_(m.write, f"{path}/hugepages-2048kB/nr_hugepages", str(n % 40))
        elif deed == "map":
            self.try_(self._map, where, n % 30)
        elif deed == "swap" and m.swap is None:
            m.swapon((n + 2) << 12)
        elif deed == "marks":
            name, value = (
                ("watermark_boost_factor", 0),
                ("min_free_kbytes", 1000 + 10 * n),
                ("watermark_scale_factor", 10 + n // 4),
            )[where % 3]
            self.try_(m.write, f"/proc/sys/vm/{name}", str(value))
        elif deed == "signal":
            m.signal_pending = where % 2 == 0

    def _map(self, where: int, n: int) -> None:
        """Map huge pages and touch some of them."""
        name = f"huge{where}"
        if name not in self.m.users:
            policy = new_policy(self.m, "preferred", [self.node])
            mapped = HugetlbUser(self.m, name, n, reserve=where % 2 == 0, policy=policy)
            mapped.fault(0, where % (n + 1))

    def _pin(self, where: int, long_term: bool) -> None:
        can = [u for u in self.users if u.kind <= 3 and u.pages]
        if can:
            chosen = can[where % len(can)]
            with contextlib.suppress(KernelError):
                self.pins.append(self.m.pin(chosen, where % chosen.pages, long_term))


def ask_and_try(m: Machine, block: int) -> tuple[bool, bool]:
    """Ask about a block and then try; whether it went, and whether nothing was left to chance."""
    before = dump(m)
    said = m.explain_offline(block)
    assert differences(before, dump(m)) == []
    sure, certain = not said.uncertain, said.certain
    try:
        m.write(STATE % block, "offline")
    except KernelError as e:
        assert not said.can_go or not certain, (block, str(e), said.as_dict())
        # Which page is left over where there is no room for all is not foreseen.
        left = any(o.kind in ("nowhere to go", "hugetlb") for o in said.obstacles)
        if said.obstacles and not left:
            # If there may be no room, the wait for it may come first.
            waited = not sure and e.errno == errno.EINTR
            assert waited or e.errno == said.errno, (str(e), said.obstacles[0])
        if e.reason == "failure to isolate range":
            assert e.pfn == said.obstacles[0].pfn
        return False, sure
    assert said.can_go or not certain, (block, said.as_dict())
    return True, sure


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
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


HUGE = st.lists(
    st.tuples(
        st.sampled_from(["thp", "thp", "hugetlb", "hugetlb", "anon", "file", "slab"]),
        st.integers(1, 200),  # huge pages
        st.integers(0, 1),  # node
        st.integers(0, 40),  # more huge pages in the pool
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from(["movable", "movable", "kernel"]), min_size=1, max_size=3),
    HUGE,
    st.none() | st.integers(0, 6000),
    st.booleans(),
)
def test_verdict_and_attempt_agree_on_huge_pages_in_kernel_zones(
    kinds: list[str], users: Any, left: int | None, swap: bool
) -> None:
    """Node 0 has kernel zones only, node 1 zones of both kinds, and either is asked about."""
    m = Life(kinds, single=False).m
    if swap:
        m.swapon(64 << 20)
    for i, (kind, n, node, more) in enumerate(users):
        policy = new_policy(m, "preferred", [node])
        if kind == "hugetlb":
            pool = Path(f"/sys/devices/system/node/node{node}/hugepages/hugepages-2048kB")
            with contextlib.suppress(KernelError):
                m.write(str(pool / "nr_hugepages"), str(n + more))
                HugetlbUser(m, f"u{i}", n, policy=policy).fault(0, n)
            continue
        thp = kind == "thp"
        pages = n * 512 if thp or kind == "anon" else n * 40
        made = User(m, f"u{i}", "anon" if thp else kind, pages, policy=policy)
        made.thp = "always" if thp else "never"
        with contextlib.suppress(KernelError):
            made.fault(0, pages)
    if left is not None:
        leave_free(m, 1, left)
    m.validate()
    for block in (3, 5, *range(32, 32 + len(kinds)), 6):
        ask_and_try(m, block)
    m.validate()


# -- where it would fit -----------------------------------------------------------------------


def test_what_leaves_a_kernel_zone_cannot_go_to_a_movable_one() -> None:
    m = two_nodes("memhp_default_state=offline")
    m.plug("a", 1, DIMM, 2 * BLOCK)
    m.write(STATE % 32, "online_kernel")
    made = user(m, "hog", "anon", 3000, 1)
    m.write(STATE % 33, "online_movable")
    said = m.explain_offline(32)
    assert said.room is not None
    assert [(t.nid, t.zone) for t in said.room.targets] == [(0, "DMA32"), (0, "DMA")]
    assert said.moves == {("hog", "anon"): 3000}
    leave_free(m, 0, 2999)
    said = m.explain_offline(32)
    assert said.room is not None
    assert said.room.most == 2999
    assert said.obstacles[0].kind == "nowhere to go"
    assert ask_and_try(m, 32) == (False, True)
    assert len(set(made.pfns().tolist())) == 3000
    m.validate()


def test_a_single_node_takes_its_own_pages_but_not_in_the_block() -> None:
    m = two_nodes("memhp_default_state=offline")
    m.plug("a", 0, DIMM, 2 * BLOCK)
    for block in (32, 33):
        m.write(STATE % block, "online_movable")
    user(m, "hog", "anon", 1000, 0)
    block = int(m.users["hog"].pfns()[0]) // 32768
    said = m.explain_offline(block)
    assert said.room is not None
    assert said.room.nodemask == (0,)
    free = {t.zone: t.free for t in said.room.targets}
    assert free["Movable"] == 32768
    assert ask_and_try(m, block) == (True, True)
    m.validate()


def test_notifiers_that_cannot_be_asked_are_assumed_to_agree() -> None:
    m = machine()
    register_memory_notifier(m, MemoryNotifier("driver", lambda m, action, arg: 0))
    said = m.explain_offline(32)
    assert said.can_go
    assert any("driver" in text for text in said.assumptions)
    m.notifier_errors["MEM_GOING_OFFLINE"] = -errno.ENOMEM
    said = m.explain_offline(32)
    assert (said.errno, said.obstacles[0].kind) == (errno.ENOMEM, "notifier")
    assert m.log == machine().log  # asking leaves no word in the log
    m.validate()


def movable_next_to_kernel(blocks: int, **more: Any) -> Machine:
    """Node 0 has kernel zones only, node 1 has nothing but a Movable one."""
    m = two_nodes("memhp_default_state=online_movable", **more)
    m.plug("a", 1, DIMM, blocks * BLOCK)
    return m


def test_huge_pages_leave_a_kernel_zone_for_a_movable_one() -> None:
    m = movable_next_to_kernel(4)
    made = User(m, "thp", "anon", 150000, thp="always", policy=new_policy(m, "bind", [0]))
    made.fault(0, 150000)
    said = m.explain_offline(3)
    assert said.room is not None
    assert [(t.nid, t.zone, t.huge_only) for t in said.room.targets] == [(1, "Movable", True)]
    assert (said.room.sure, said.room.most) == (0, 0)
    assert said.room.most_huge > 120000
    assert ("thp", "anon") in said.moves
    assert (said.can_go, said.certain) == (True, True)
    assert "for huge pages only" in str(said)
    assert ask_and_try(m, 3) == (True, True)
    m.validate()


def test_pools_huge_pages_leave_a_kernel_zone_for_a_movable_one() -> None:
    m = movable_next_to_kernel(4)
    m.write("/sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages", "300")
    HugetlbUser(m, "h", 250, policy=new_policy(m, "bind", [0])).fault(0, 250)
    said = m.explain_offline(3)
    assert (said.can_go, said.moves) == (True, {("h", "hugetlb"): 32768})
    assert m.offline_pages_report(3).errno == 0
    m.validate()


def test_what_is_too_much_for_the_movable_zone_is_split_and_stays() -> None:
    m = movable_next_to_kernel(1)
    made = User(m, "thp", "anon", 1024 * 150, thp="always", policy=new_policy(m, "bind", [0]))
    made.fault(0, made.pages)
    said = m.explain_offline(3)
    assert (said.errno, said.obstacles[0].kind) == (errno.EINTR, "nowhere to go")
    assert said.certain
    assert "32768 pages to move" in said.obstacles[0].rule
    assert ask_and_try(m, 3) == (False, True)
    m.validate()


@pytest.mark.parametrize(("kind", "swap"), [("file", False), ("anon", True), ("anon", False)])
def test_no_is_not_certain_where_what_moved_can_be_reclaimed(kind: str, swap: bool) -> None:
    m = machine("kernel", 1)
    if swap:
        m.swapon(256 << 20)
    user(m, "hog", kind, 6000, 1)
    leave_free(m, 0, 2000)
    said = m.explain_offline(32)
    assert (said.can_go, said.obstacles[0].kind) == (False, "nowhere to go")
    assert said.certain == (kind == "anon" and not swap)
    first = str(said).splitlines()[0]
    could = "could" if said.certain else "might"
    assert first.startswith(f"memory32 {could} not go offline now: EINTR")
    assert first.endswith("; that is not certain") != said.certain
    ask_and_try(m, 32)
    m.validate()


# -- machines from files ----------------------------------------------------------------------


def test_of_a_machine_from_files_it_says_what_it_assumed() -> None:
    live = two_nodes("memhp_default_state=offline")
    live.plug("a", 1, DIMM, 2 * BLOCK)
    live.write(STATE % 32, "online_kernel")
    live.write(STATE % 33, "online_movable")
    user(live, "hog", "anon", 5000, 1)
    user(live, "tables", "page_table", 700, 1)
    drain_all_pages(live)
    m = Machine.from_files(snapshot_files(live))
    before = dump(m)
    movable, kernel = m.explain_offline(33), m.explain_offline(32)
    assert differences(before, dump(m)) == []
    assert movable.can_go
    assert movable.nr_to_move == 5000
    assert movable.moves == {("unknown", "unknown"): 5000}
    assert any("none of them to be pinned" in text for text in movable.assumptions)
    assert kernel.errno == errno.EBUSY
    assert {o.user for o in kernel.obstacles} == {None}
    assert any("700 pages in use 0 are on LRU lists" in text for text in kernel.assumptions)
    m.validate()


def test_pages_that_all_are_on_lru_lists_can_leave_a_kernel_zone() -> None:
    live = two_nodes("memhp_default_state=online_kernel")
    live.plug("a", 1, DIMM, BLOCK)
    user(live, "hog", "anon", 5000, 1)
    drain_all_pages(live)
    m = Machine.from_files(snapshot_files(live))
    said = m.explain_offline(32)
    assert said.can_go
    assert said.nr_to_move == 5000
    m.validate()


# -- the command line -------------------------------------------------------------------------


def kmm(*args: object) -> Result:
    return CliRunner().invoke(main, ["why", *(str(a) for a in args)])


def test_why_tells_in_words_and_by_its_exit_code() -> None:
    first = EXAMPLES / "first_dimm.toml"
    out = kmm("memory33", "--scenario", first, "--steps", 2)
    assert out.exit_code == 0
    assert out.output.splitlines()[0] == "memory33 could go offline now"
    out = kmm(32, "--scenario", first, "--steps", 2)
    assert out.exit_code == 1
    assert out.output.splitlines()[0] == "memory32 is offline already: EINVAL (Invalid argument)"
    out = kmm(3, "--from", RECORDINGS / "migrate.json")
    assert out.exit_code in (0, 1)
    assert "assumed:" in out.output or "could go" in out.output


def test_why_as_json() -> None:
    out = kmm(32, "--from", RECORDINGS / "migrate.json", "--steps", 2, "--json")
    assert out.exit_code == 0
    said = json.loads(out.output)
    assert said["can_go"] is True
    assert said["moves"][0]["kind"] == "shmem"
    assert said["room"]["zones"][0]["zone"] == "DMA32"
    out = kmm(32, "--from", RECORDINGS / "kernel_pages.json", "--json")
    assert out.exit_code == 2  # it has not come yet


def test_why_of_saved_files(tmp_path: Path) -> None:
    live = machine()
    user(live, "hog", "anon", 500, 1)
    drain_all_pages(live)
    for path, text in snapshot_files(live).items():
        if path.startswith("/"):
            file = tmp_path / path[1:]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    out = kmm(32, "--from", tmp_path)
    assert out.exit_code == 0, out.output
    assert "500 of 'unknown' (unknown)" in out.output


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ((5,), "--scenario"),
        ((5, "--from", "/x", "--scenario", "/y"), "--scenario"),
        (("x", "--from", "/tmp"), "BLOCK"),
        ((5, "--from", "/nowhere"), "/nowhere"),
        ((5, "--scenario", "/nowhere"), "/nowhere"),
        ((4711, "--from", RECORDINGS / "migrate.json"), "BLOCK: 4711; allowed"),
        ((33, "--from", RECORDINGS / "migrate.json"), "--steps says how many"),
        (("memory33", "--scenario", EXAMPLES / "first_dimm.toml", "--steps", 0), "--steps says"),
        ((32, "--from", RECORDINGS / "migrate.json", "--steps", 99), "--steps"),
        ((32, "--from", RECORDINGS, "--steps", 1), "--steps"),
    ],
)
def test_mistakes_are_told_in_a_line_and_exit_with_2(args: tuple[object, ...], word: str) -> None:
    out = kmm(*args)
    assert out.exit_code == 2
    assert word in out.output
    assert "Traceback" not in out.output


def test_words_name_the_pages_in_the_way() -> None:
    m = machine("kernel")
    slab = user(m, "dentry", "slab", 6, 1)
    lines = why_lines(m.explain_offline(32))
    first = " ".join(f"{p:#x}" for p in sorted(slab.pfns().tolist())[:4])
    assert f"  slab: 6 pages, pfn {first} ..., of 'dentry' (slab), pageblock Unmovable" in lines
    assert "    has_unmovable_pages: unmovable page" in lines
    m.validate()
