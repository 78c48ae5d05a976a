"""What an explanation of an offline says: obstacles, what would move, where it would fit."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Any

from kmm.offline_room import Room

#: Per kind of what isolation refuses: the name, and what would help.
KERNEL_USES = {
    "slab_reclaimable": ("slab", "drop the caches: echo 2 > /proc/sys/vm/drop_caches"),
    "slab": ("slab", "whoever filled the cache has to let go of its objects"),
    "stack": ("stack", "the task that runs on it has to end"),
    "page_table": ("page table", "the address space that it maps has to shrink or end"),
    "kernel": ("kernel page", "the part of the kernel that has it has to free it"),
    "offline": ("offline page", "its driver has to give it back"),
    "hugetlb": ("hugetlb", "its pool has to shrink"),
}
NEXT_TIME = "; bring the block online as online_movable next time"


#: What luck may take out of the way, if there is doubt.
_MAY_VANISH = ("nowhere to go", "hugetlb")


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One thing that keeps a block from going.

    ``kind`` in a word; ``pfn`` and ``nr_pages`` if it is pages; ``user`` and ``user_kind`` who has
    them, as far as is known; ``migratetype`` of their pageblock; ``rule`` what the kernel does and
    where; ``errno`` what the attempt ends with; ``helps`` what would take it out of the way.
    ``guessed`` tells that the pages were laid out from counts: on the real machine they may lie
    elsewhere.
    """

    kind: str
    rule: str
    errno: int
    helps: str
    pfn: int | None = None
    nr_pages: int = 0
    user: str | None = None
    user_kind: str | None = None
    migratetype: str | None = None
    guessed: bool = False

    @property
    def may_vanish(self) -> bool:
        """Whether luck may take it out of the way, if there is doubt."""
        return self.guessed or self.kind in _MAY_VANISH


@dataclass(slots=True)
class Explanation:
    """What an attempt to take a block offline would meet.

    ``moves`` has pages by (user, its kind) that would move, ``goes_along`` pages that need not:
    ``free``, ``poisoned``, ``offered`` by their driver, ``dissolved``.  ``room`` is where what
    moves would fit.  ``assumptions`` is what could not be known; with ``uncertain`` an attempt may
    end otherwise, as reclaim, compaction or stealing decide: with another errno, or, unless the
    verdict is ``certain``, with another outcome.
    """

    block_id: int
    start_pfn: int
    nr_pages: int
    zone: str | None
    node: int
    state: str = "online"
    goes_along: dict[str, int] = field(default_factory=dict)
    moves: dict[tuple[str, str], int] = field(default_factory=dict)
    room: Room | None = None
    obstacles: list[Obstacle] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)
    uncertain: bool = False

    @property
    def can_go(self) -> bool:
        """Whether nothing is in the way."""
        return not self.obstacles

    @property
    def certain(self) -> bool:
        """Whether an attempt cannot turn out otherwise than ``can_go`` says."""
        return not self.uncertain or any(not o.may_vanish for o in self.obstacles)

    @property
    def errno(self) -> int:
        """What the attempt would end with: the errno of the obstacle that is met first, or 0."""
        return self.obstacles[0].errno if self.obstacles else 0

    @property
    def nr_to_move(self) -> int:
        """How many pages would have to move."""
        return sum(self.moves.values())

    def __str__(self) -> str:
        """What ``kmm why`` prints."""
        from kmm.offline_why import why_lines

        return "\n".join(why_lines(self))

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return {
            "block": self.block_id,
            "start_pfn": self.start_pfn,
            "nr_pages": self.nr_pages,
            "node": self.node,
            "zone": self.zone,
            "state": self.state,
            "can_go": self.can_go,
            "certain": self.certain,
            "uncertain": self.uncertain,
            "errno": errno.errorcode.get(self.errno) if self.errno else None,
            "goes_along": self.goes_along,
            "moves": [
                {"user": user, "kind": kind, "pages": n} for (user, kind), n in self.moves.items()
            ],
            "room": self.room.as_dict() if self.room is not None else None,
            "obstacles": [
                {name: getattr(o, name) for name in Obstacle.__slots__} for o in self.obstacles
            ],
            "assumptions": self.assumptions,
        }
