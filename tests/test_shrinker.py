"""Reclaimable slabs give back what nobody holds, as much as a priority asks for."""

from __future__ import annotations

import pytest

from kmm import KernelError, Machine
from kmm.memory import User
from kmm.shrinker import Shrinker, do_shrink_slab, shrink_slab
from kmm.vmstat import all_node_items, all_vm_events


def cache(m: Machine, pages: int, percent: int = 100, seeks: int = 2) -> User:
    user = User(m, "dentry", "slab_reclaimable", pages)
    user.shrinker = Shrinker(percent, seeks)
    user.fault(0, pages)
    return user


def test_a_priority_asks_for_its_share(m: Machine) -> None:
    user = cache(m, 64_000)
    assert do_shrink_slab(m, user, 6) == (64_000 >> 6) * 2 // 128 * 128
    assert all_vm_events(m)["slabs_scanned"] == 1920
    # What was not asked for at once adds up.
    assert user.shrinker is not None
    assert user.shrinker.nr_deferred == 2000 - 1920
    assert user.nr_present == all_node_items(m)["nr_slab_reclaimable"] == 64_000 - 1920
    m.validate()


def test_little_is_deferred_until_it_is_a_batch(m: Machine) -> None:
    user = cache(m, 64_000)
    freed = [do_shrink_slab(m, user, 12) for _ in range(6)]
    assert freed == [0] * 6
    assert user.shrinker is not None
    assert user.shrinker.nr_deferred == 6 * 30
    assert do_shrink_slab(m, user, 0) > 0


def test_what_is_held_stays(m: Machine) -> None:
    user = cache(m, 50_000, percent=30)
    shrinker = user.shrinker
    assert shrinker is not None
    free = shrinker.count_objects(user)
    assert 14_000 < free < 16_000
    m.write("/proc/sys/vm/drop_caches", "2")
    assert user.nr_present == 50_000 - free
    assert shrinker.count_objects(user) == 0
    assert shrink_slab(m, 0, 0) == 0
    assert all_vm_events(m)["drop_slab"] == 1
    m.validate()


def test_a_cache_that_costs_more_gives_less(m: Machine) -> None:
    user = cache(m, 64_000, seeks=8)
    assert do_shrink_slab(m, user, 4) == 64_000 // 16 * 4 // 8 // 128 * 128
    assert shrink_slab(m, 0, 4) >= 0


def test_memory_pressure_takes_slabs_first_where_there_is_nothing_else(m: Machine) -> None:
    user = cache(m, 60_000)
    a = User(m, "a", "anon", 190_000)
    a.fault(0, 190_000)
    assert user.nr_present < 60_000
    assert all_vm_events(m)["oom_kill"] == 0
    assert a.nr_present == 190_000
    m.validate()


def test_an_own_rule(m: Machine) -> None:
    asked: list[int] = []

    class Stingy(Shrinker):
        def scan_objects(self, user: User, nr_to_scan: int) -> int:
            asked.append(nr_to_scan)
            return super().scan_objects(user, 1)

    user = cache(m, 1000)
    user.shrinker = Stingy()
    assert do_shrink_slab(m, user, 1) == len(asked) == 1000 // 2 * 2 // 128
    user.close()
    assert shrink_slab(m, 0, 0) == 0
    m.validate()


@pytest.mark.parametrize(("percent", "seeks"), [(-1, 2), (101, 2), (50, -1)])
def test_bad_rules_are_named(percent: int, seeks: int) -> None:
    with pytest.raises(KernelError, match="percent" if seeks == 2 else "seeks"):
        Shrinker(percent, seeks)
