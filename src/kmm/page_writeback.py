"""Dirty pages of files: when they are written, and who waits (mm/page-writeback.c, fs-writeback.c).

The backing store has a page at once, unless ``Machine.writeback_delay`` says how long it takes.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from kmm import _filemap, _page_ref
from kmm.clock import SECOND
from kmm.errors import ValidationError
from kmm.params import PG_WRITEBACK, USER_FILE
from kmm.trace import note, traced
from kmm.watermarks import global_dirty_limits

if TYPE_CHECKING:
    from kmm.machine import Machine
    from kmm.memory import User

CHUNK = 1024  # pages of one file that are written before the next has its turn
MAX_PAUSE = SECOND // 5

_NR_DIRTY, _NR_WRITEBACK = 20, 21


def _node_stat(m: Machine, item: int) -> int:
    return sum(m.memmap_engine.node_stat(nid)[item] for nid in m.nodes)


def nr_dirty(m: Machine) -> int:
    """Return how many pages of files are dirty."""
    return _node_stat(m, _NR_DIRTY)


def dirty_files(m: Machine) -> list[User]:
    """Files with dirty pages, the one that is dirty longest first."""
    files = [u for u in m.users.values() if u.kind == USER_FILE and u.engine.nr_dirty]
    return sorted(files, key=lambda u: (u.dirtied_when or 0, u.engine.number))


def write_file(m: Machine, user: User, nr_to_write: int) -> int:
    """Write dirty pages of one file, from where it was left upward and round; how many.

    :param nr_to_write: stop after so many pages.
    """
    written, waits = 0, m.writeback_delay == 0
    start = user.writeback_index if user.writeback_index < user.pages else 0
    for first, end in ((start, user.pages), (0, start)):
        if written >= nr_to_write or first == end:
            continue
        note(m, "write_cache_pages")
        n, at = _filemap.write_cache_pages(
            user.engine, m, first, end - first, nr_to_write - written, waits
        )
        if n and not waits:
            done = partial(_end_writeback, m, user, first, at)
            m.clock.call_after(m.writeback_delay, done)
        written += n
        user.writeback_index = at
    if not user.engine.nr_dirty:
        user.dirtied_when = None
    return written


def _end_writeback(m: Machine, user: User, start: int, end: int) -> None:
    end = min(end, user.pages)
    if m.users.get(user.name) is user and start < end:
        _filemap.end_writeback(user.engine, m, start, end - start)


@traced
def wb_writeback(m: Machine, nr_pages: int) -> int:
    """Write dirty pages, a chunk of each file in turn; returns how many.

    :param nr_pages: stop after so many.
    """
    written = 0
    while written < nr_pages:
        before = written
        for user in dirty_files(m):
            if written < nr_pages:
                written += write_file(m, user, min(CHUNK, nr_pages - written))
        if written == before:
            break
    return written


@traced
def wakeup_flusher_threads(m: Machine) -> None:
    """Write what is dirty, as reclaim asks for when it finds nothing else."""
    wb_writeback(m, nr_dirty(m))


def sync(m: Machine) -> None:
    """Write all dirty pages of files and wait until the backing store has them."""
    wb_writeback(m, nr_dirty(m))
    while _node_stat(m, _NR_WRITEBACK) > 0 and m.clock.next_event() is not None:
        m.clock.wait_until(m.clock.now + max(m.writeback_delay, 1))


def folio_wait_writeback(m: Machine, pfn: int) -> None:
    """Let time pass until a page is written, as far as anything is going to happen."""
    while _page_ref.marks(m.memmap_engine, pfn) & PG_WRITEBACK:
        when = m.clock.next_event()
        if when is None:
            return
        m.clock.wait_until(when)


@traced
def balance_dirty_pages(m: Machine, user: User) -> None:
    """Start the writing back above the background limit; wait while there are too many.

    Below the middle between the background limit and the limit nobody waits.

    :param user: the file that has just been written.
    """
    if user.dirtied_when is None and user.engine.nr_dirty:
        user.dirtied_when = m.clock.now
    background, limit = global_dirty_limits(m)
    dirty = nr_dirty(m)
    if dirty > background:
        wb_writeback(m, dirty - background)
    while nr_dirty(m) + _node_stat(m, _NR_WRITEBACK) > (background + limit) // 2:
        if not m.writeback_delay or m.clock.next_event() is None:
            return
        m.clock.wait_until(m.clock.now + MAX_PAUSE)
        background, limit = global_dirty_limits(m)


def check_dirty(m: Machine) -> None:
    """Compare the dirty pages of all files with what the nodes count.

    :raises ValidationError: if they disagree.
    """
    mine = sum(user.engine.nr_dirty for user in m.users.values())
    if mine != nr_dirty(m):
        raise ValidationError(f"nr_dirty: {nr_dirty(m)}, but files have {mine}")
