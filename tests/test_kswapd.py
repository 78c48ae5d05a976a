"""kswapd wakes at the low watermark, works until the high one, and sleeps where there is no hope."""

from __future__ import annotations

import numpy as np
import pytest

from kmm import KernelError, Machine
from kmm.clock import SECOND
from kmm.kswapd import run_kswapds
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.vmscan import kswapd_failures
from kmm.vmstat import all_vm_events
from tests.conftest import DIMM, two_nodes


def machine() -> Machine:
    m = two_nodes("memhp_default_state=online_movable")
    m.plug("a", 1, DIMM, 1 << 28)
    return m


def on_node_1(m: Machine, kind: str, pages: int, name: str = "u") -> User:
    return User(m, name, kind, pages, policy=new_policy(m, "bind", [1]), tokens=True)


def test_it_wakes_at_low_and_stops_at_high() -> None:
    m = machine()
    zone = m.nodes[1].zone(3)
    f = on_node_1(m, "file", 200_000)
    above = zone.managed_pages - zone.low_wmark_pages()
    f.read(0, above - 2000)
    assert all_vm_events(m)["pageoutrun"] == 0
    seen = []
    for start in range(above - 2000, 200_000, 500):
        f.read(start, min(500, 200_000 - start))
        seen.append(zone.nr_free_pages)
    events = all_vm_events(m)
    assert events["pageoutrun"] > 10
    assert events["pgsteal_kswapd"] > 100_000
    assert events["pgscan_direct"] == 0
    assert min(seen) > zone.min_wmark_pages()
    # It frees little more than it has to.
    assert max(seen[10:]) < zone.high_wmark_pages() + 4096
    assert kswapd_failures(m, 1) == 0
    m.validate()


def test_where_nothing_can_be_freed_it_gives_up_as_the_real_one() -> None:
    m = machine()
    a = on_node_1(m, "anon", 100_000)
    with pytest.raises(KernelError):
        a.fault(0, 100_000)
    events = all_vm_events(m)
    # A recorded 6.1.192 counts exactly these.
    assert events["pageoutrun"] == 16
    assert events["kswapd_high_wmark_hit_quickly"] == 15
    assert events["kswapd_low_wmark_hit_quickly"] == 0
    assert events["allocstall_movable"] == 17
    assert events["pgscan_kswapd"] == events["pgscan_direct"] == 0
    assert events["oom_kill"] == 1
    shown = m.read("/proc/zoneinfo").split("node_unreclaimable:")
    assert [s.split()[0] for s in shown[1:]] == ["0", "0", "1"]
    m.validate()


def test_what_direct_reclaim_frees_gives_hope_again() -> None:
    m = machine()
    a = on_node_1(m, "anon", 100_000)
    with pytest.raises(KernelError):
        a.fault(0, 100_000)
    assert kswapd_failures(m, 1) == 16
    f = on_node_1(m, "file", 100_000, "f")
    f.read(0, 100_000)
    events = all_vm_events(m)
    assert events["pgsteal_direct"] > 0
    assert events["pgsteal_kswapd"] > 0
    assert kswapd_failures(m, 1) == 0
    m.validate()


def test_a_nap_ends_early_or_in_sleep() -> None:
    m = machine()
    f = on_node_1(m, "file", 100_000)
    f.read(0, 64_500)
    early = all_vm_events(m)["kswapd_low_wmark_hit_quickly"]
    runs = all_vm_events(m)["pageoutrun"]
    assert runs >= 1
    m.clock.advance(SECOND)  # asleep
    f.read(64_500, 5000)
    assert all_vm_events(m)["pageoutrun"] > runs
    again = all_vm_events(m)["kswapd_low_wmark_hit_quickly"]
    f.read(70_000, 20_000)
    assert all_vm_events(m)["kswapd_low_wmark_hit_quickly"] > again >= early
    m.validate()


def test_a_boost_is_reclaimed_for_without_writing_and_falls() -> None:
    m = machine()
    m.swapon(1 << 30)
    zone = m.nodes[1].zone(3)
    f, a = on_node_1(m, "file", 20_000), on_node_1(m, "anon", 20_000, "a")
    f.read(0, 20_000)
    a.fault(0, 20_000)
    zone.watermark_boost = 1000
    m.memmap_engine.wakeup_kswapd(zone.index, 0, 3)
    run_kswapds(m)
    assert zone.watermark_boost == 0
    assert 20_000 - f.nr_present >= 1000
    assert a.nr_present == 20_000
    m.validate()


def test_cpus_keep_fewer_free_pages_while_it_works() -> None:
    m = machine()
    zone = m.nodes[1].zone(3)
    seen = []
    f = on_node_1(m, "file", 62_000)
    f.read(0, 60_000)
    s = User(m, "slab", "slab_reclaimable", 10)

    class Watcher:
        nr_deferred, seeks = 0, 2

        def count_objects(self, user: User) -> int:
            seen.append(zone.pcp_state(0)[1:3])
            return 0

    s.shrinker = Watcher()  # type: ignore[assignment]
    f.read(60_000, 2000)
    g = on_node_1(m, "file", 10_000, "g")
    g.read(0, 10_000)
    assert seen
    assert all(high == 4 * batch for high, batch in seen)
    assert zone.pcp_state(0)[1] == zone.pageset_high
    m.validate()


def test_a_node_without_memory_has_none_to_wake(m: Machine) -> None:
    zone = m.nodes[0].zones[1]
    m.kthreads.discard("kswapd0")
    m.memmap_engine.wakeup_kswapd(zone.index, 0, 1)
    zone.watermark_boost = 5
    run_kswapds(m)
    assert all_vm_events(m)["pageoutrun"] == 0
    assert zone.watermark_boost == 5


def test_swapped_tokens_read_back_after_many_rounds() -> None:
    m = machine()
    m.swapon(1 << 30)
    a = on_node_1(m, "anon", 120_000)
    rng = np.random.default_rng(1)
    want = np.zeros(120_000, dtype=np.uint64)
    for _ in range(40):
        start = int(rng.integers(0, 110_000))
        a.write(start, 10_000)
        values = rng.integers(1, 1 << 60, 10_000).astype(np.uint64)
        at = a.pfns(start, 10_000) >= 0
        for run in np.split(
            np.flatnonzero(at), np.flatnonzero(np.diff(np.flatnonzero(at)) != 1) + 1
        ):
            if len(run):
                a.write_tokens(start + int(run[0]), values[run])
                want[start + run] = values[run]
    assert a.engine.nr_swapped > 0
    assert (a.read_tokens(0, 120_000) == want).all()
    m.validate()
