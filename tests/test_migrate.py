"""Pages in use leave a block that goes offline, and take what they hold along."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from kmm import KernelError, Machine
from kmm.clock import SECOND
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.vmstat import all_vm_events, node_items
from tests.conftest import DIMM, two_nodes

BLOCK = 128 << 20
STATE = "/sys/devices/system/memory/memory%d/state"


def machine(blocks: int = 2) -> Machine:
    m = two_nodes("memhp_default_state=online_movable")
    m.plug("a", 1, DIMM, blocks * BLOCK)
    return m


def anon(m: Machine, pages: int, thp: str = "never") -> User:
    user = User(m, "hog", "anon", pages, policy=new_policy(m, "bind", [1]), tokens=True, thp=thp)
    user.grow(pages)
    user.write_tokens(0, np.arange(pages, dtype=np.uint64) * 7 + 1)
    return user


def holds_what_it_wrote(user: User) -> bool:
    want = np.arange(user.pages, dtype=np.uint64) * 7 + 1
    return bool((user.read_tokens(0, user.pages) == want).all())


@pytest.mark.parametrize("thp", ["never", "madvise"])
def test_what_is_used_moves_to_another_node(thp: str) -> None:
    m = machine()
    user = anon(m, 10 * 512, thp)
    assert (user.pfns() >= DIMM >> 12).all()
    assert node_items(m, m.nodes[1])["nr_inactive_anon"] == 5120
    assert node_items(m, m.nodes[1])["nr_anon_transparent_hugepages"] == (
        10 if thp != "never" else 0
    )
    m.write(STATE % 32, "offline")
    assert (user.pfns() < DIMM >> 12).all()
    assert holds_what_it_wrote(user)
    assert node_items(m, m.nodes[1])["nr_anon_pages"] == 0
    assert node_items(m, m.nodes[0])["nr_anon_pages"] == 5120
    assert all_vm_events(m)["pgmigrate_success"] == 5120
    m.validate()
    assert user.release(0, user.pages) == 5120
    m.validate()


def test_what_has_nowhere_to_go_stays_until_patience_ends() -> None:
    m = machine()
    user = anon(m, 60000)
    filler = User(m, "filler", "anon", m.totalram_pages, policy=new_policy(m, "bind", [0]))
    filler.oom_score_adj = user.oom_score_adj = -1000
    with pytest.raises(KernelError):
        filler.grow(filler.pages)
    with pytest.raises(KernelError, match="nowhere to go; given up after 60 s") as e:
        m.write(STATE % 33, "offline")
    assert e.value.errno == errno.EINTR
    assert m.read(STATE % 33) == "online\n"
    assert holds_what_it_wrote(user)
    m.validate()
    # What makes room meanwhile helps the next try.
    m.clock.call_after(3 * SECOND, filler.close)
    m.write(STATE % 33, "offline")
    assert holds_what_it_wrote(user)
    m.validate()


def test_a_signal_ends_the_wait() -> None:
    m = machine()
    m.alloc_pages(nid=1, gfp=0x100CCA)

    def signal() -> None:
        m.signal_pending = True

    m.clock.call_after(5 * SECOND, signal)
    with pytest.raises(KernelError, match="a signal came") as e:
        m.write(STATE % 32, "offline")
    assert e.value.errno == errno.EINTR
    assert m.clock.now == 5 * SECOND
    m.validate()


def test_a_users_page_is_not_freed_by_others() -> None:
    m = machine()
    user = anon(m, 100)
    with pytest.raises(KernelError) as e:
        m.free_pages(int(user.pfns()[50]))
    assert e.value.errno == errno.EBUSY
    with pytest.raises(KernelError) as e:
        m.free_pages_bulk(user.pfns())
    assert e.value.errno == errno.EBUSY
    assert holds_what_it_wrote(user)
    m.validate()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOMEM])
@pytest.mark.parametrize("thp", ["never", "madvise"])
def test_a_target_that_fails_in_any_way_leaves_no_page_behind(code: int, thp: str) -> None:
    m = machine()
    user = anon(m, 20 * 512, thp)
    filler = User(m, "filler", "kernel", m.totalram_pages, policy=new_policy(m, "bind", [0]))
    with pytest.raises(KernelError):
        filler.grow(filler.pages)
    before = node_items(m, m.nodes[1])["nr_inactive_anon"]
    probes = m.trace(recording=False)
    probes.fail("__alloc_pages", code)
    with pytest.raises(KernelError):
        m.write(STATE % 32, "offline")
    m.kprobes = None
    m.validate()
    items = node_items(m, m.nodes[1])
    assert (items["nr_inactive_anon"], items["nr_isolated_anon"]) == (before, 0)
    assert holds_what_it_wrote(user)
    filler.close()
    m.write(STATE % 32, "offline")
    assert holds_what_it_wrote(user)
    m.validate()


def test_time_that_passes_within_what_happens_is_not_taken_back() -> None:
    m = machine()
    m.clock.call_after(10, lambda: m.clock.advance(1000))
    m.clock.call_after(20, lambda: None)
    m.clock.advance(50)
    assert m.clock.now == 1010
