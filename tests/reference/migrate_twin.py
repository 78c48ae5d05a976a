"""What migrate_pages does to a list of pages, worked out plainly, one page after the other."""

from __future__ import annotations

from dataclasses import dataclass, field

BATCH = 512
PASSES = 10
MIGRATE_SYNC = 2


@dataclass(frozen=True)
class Entry:
    """A page or huge page of the list; ``written_at`` is when its writeback ends, in ns."""

    pfn: int
    pages: int
    pinned: bool
    written_at: int


@dataclass
class Outcome:
    """What became of a list, in the order in which it happened."""

    now: int
    moved: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    asked: int = 0  # base pages that were allocated for it, each time anew
    succeeded: int = 0
    failed: int = 0
    thp_failed: int = 0


def migrate_pages(entries: list[Entry], mode: int, now: int) -> Outcome:
    """Move a list batch by batch, as long as there are targets for all."""
    out, rest = Outcome(now), list(entries)
    while rest:
        batch: list[Entry] = []
        while rest and sum(e.pages for e in batch) + rest[0].pages <= BATCH:
            batch.append(rest.pop(0))
        aside: list[Entry] = []
        for number in range(PASSES):
            again = []
            for entry in batch:
                what = _try(out, entry, mode, force=number > 2)
                if what == "again":
                    again.append(entry)
                elif what == "failed":
                    aside.append(entry)
            batch = again
        for entry in aside + batch:
            out.left.append(entry.pfn)
            out.failed += entry.pages
            out.thp_failed += entry.pages == BATCH
    return out


def _try(out: Outcome, entry: Entry, mode: int, *, force: bool) -> str:
    out.asked += entry.pages
    if entry.written_at > out.now:
        if mode != MIGRATE_SYNC:
            return "failed"
        if not force:
            return "again"
        out.now = entry.written_at
    if entry.pinned:
        return "again"
    out.moved.append(entry.pfn)
    out.succeeded += entry.pages
    return "moved"
