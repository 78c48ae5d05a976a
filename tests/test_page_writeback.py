"""Dirty pages are written above the background limit, oldest files first; above more one waits."""

from __future__ import annotations

from kmm import Machine
from kmm.clock import SECOND
from kmm.memory import User
from kmm.page_writeback import dirty_files, wb_writeback
from kmm.vmstat import all_node_items
from kmm.watermarks import global_dirty_limits


def test_the_flusher_keeps_dirty_pages_at_the_background_limit(m: Machine) -> None:
    f = User(m, "f", "file", 120_000, tokens=True)
    for start in range(0, 120_000, 5000):
        f.write(start, 5000)
        background, limit = global_dirty_limits(m)
        assert f.engine.nr_dirty <= background < limit
    assert f.engine.nr_dirty > 0
    assert all_node_items(m)["nr_written"] + f.engine.nr_dirty == 120_000
    assert m.clock.now == 0
    m.sync()
    assert f.engine.nr_dirty == 0
    m.validate()


def test_who_dirties_faster_than_the_store_writes_waits(m: Machine) -> None:
    m.writeback_delay = 2 * SECOND
    f = User(m, "f", "file", 120_000)
    f.write(0, 120_000)
    background, limit = global_dirty_limits(m)
    assert m.clock.now >= SECOND
    items = all_node_items(m)
    assert items["nr_dirty"] + items["nr_writeback"] <= limit
    m.sync()
    assert all_node_items(m)["nr_writeback"] == 0
    assert all_node_items(m)["nr_written"] == 120_000
    m.validate()


def test_files_take_turns_and_the_longest_dirty_begins(m: Machine) -> None:
    a, b = (User(m, name, "file", 3000) for name in "ab")
    b.write(0, 3000)
    m.clock.advance(SECOND)
    a.write(0, 3000)
    assert dirty_files(m) == [b, a]
    assert wb_writeback(m, 1500) == 1500
    assert (a.engine.nr_dirty, b.engine.nr_dirty) == (3000 - 476, 3000 - 1024)
    wb_writeback(m, 10_000)
    assert dirty_files(m) == []
    m.validate()


def test_a_file_is_written_on_from_where_it_was_left(m: Machine) -> None:
    f = User(m, "f", "file", 3000)
    f.write(0, 3000)
    wb_writeback(m, 1000)
    f.write(0, 10)
    wb_writeback(m, 2000)
    assert f.engine.nr_dirty == 10
    m.sync()
    assert f.engine.nr_dirty == 0
    m.validate()


def test_a_file_that_is_gone_before_it_is_written_stops_nothing(m: Machine) -> None:
    m.writeback_delay = SECOND
    f = User(m, "f", "file", 2000)
    f.write(0, 2000)
    wb_writeback(m, 2000)
    f.close()
    m.clock.advance(2 * SECOND)
    assert all_node_items(m)["nr_writeback"] == 0
    m.validate()
