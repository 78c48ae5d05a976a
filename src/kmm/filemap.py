"""Reading and writing pages of users, and dropping what files can spare (mm/filemap.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmm import _filemap
from kmm.mempolicy import mask_of
from kmm.page_writeback import balance_dirty_pages
from kmm.params import USER_FILE, USER_SHMEM
from kmm.trace import note

if TYPE_CHECKING:
    from kmm.machine import Machine
    from kmm.memory import User


def access(user: User, start: int, n: int, write: bool) -> int:
    """Read or write pages of a range, first to last; returns how many had to come.

    :raises OutOfMemory: when there is no memory for the next; those before it are done.
    """
    m, at, end, came = user.m, start, start + n, 0
    step = m.ratelimit_pages if write and user.kind == USER_FILE else n
    while at < end:
        before = user.engine.nr_came
        done = _access_at_once(user, at, min(end, at + step), write)
        came += user.engine.nr_came - before
        if done == 0:
            _filemap.bring_in(user.engine, m, at, user.wait_for_page(at), write)
            came, done = came + 1, 1
        at += done
        m.run_kswapds()
        if write and user.kind == USER_FILE:
            balance_dirty_pages(m, user)
    return came


def _access_at_once(user: User, at: int, end: int, write: bool) -> int:
    """Read or write as far as nothing has to be waited for; how many pages."""
    m, interleave = user.m, user.policy.mode == "interleave"
    where, before = user.placement(at), user.engine.nr_came
    n = 1 if interleave else end - at
    done = _filemap.touch(
        user.engine, m, at, n, write, user.gfp, where.nid, mask_of(where), user.cpu
    )
    if interleave and user.engine.nr_came > before:
        user.il_prev = where.nid
    return done


def drop_pagecache(m: Machine) -> int:
    """Drop all pages of files that nobody needs to write or has mapped; returns how many."""
    m.count_vm_event("drop_pagecache")
    files = [u for u in m.users.values() if u.kind in (USER_FILE, USER_SHMEM)]
    note(m, "invalidate_mapping_pages", len(files))
    return sum(_filemap.invalidate_mapping_pages(u.engine, m, 0, u.pages, u.cpu) for u in files)
