"""The answer to ``kmm why``: machines to ask about, and explanations in words."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from kmm.errors import ConfigError, shown
from kmm.offline_explanation import Explanation, Obstacle
from kmm.wording import counted


def block_of(name: str) -> int:
    """Return the number of a block that is called ``33``, ``memory33`` or by its directory.

    :raises ConfigError: for anything else.
    """
    digits = Path(name).name.removeprefix("memory")
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 9:
        raise ConfigError(f"BLOCK: {shown(name)}; allowed: a number like 33, or memory33")
    return int(digits)


def _group(obstacles: list[Obstacle]) -> list[list[Obstacle]]:
    """Put obstacles of one kind, user and rule together, in the order of the first of each."""
    groups: dict[tuple[object, ...], list[Obstacle]] = {}
    for o in obstacles:
        groups.setdefault((o.kind, o.user, o.user_kind, o.rule, o.migratetype), []).append(o)
    return list(groups.values())


def _obstacle_lines(group: list[Obstacle]) -> list[str]:
    first = group[0]
    line = f"  {first.kind}"
    if first.pfn is not None:
        line += f": {counted(sum(o.nr_pages for o in group), 'page')}, pfn "
        line += " ".join(f"{o.pfn:#x}" for o in group[:4]) + (" ..." if len(group) > 4 else "")
        if first.user is not None:
            line += f", of {first.user!r} ({first.user_kind})"
        else:
            line += f", of {'an unknown user' if first.user_kind is None else first.user_kind}"
        line += f", pageblock {first.migratetype}"
    return [line, f"    {first.rule}", f"    helps: {first.helps}"]


def why_lines(said: Explanation) -> list[str]:
    """Return an explanation in words, line by line."""
    name = f"memory{said.block_id}"
    could = "could" if said.certain else "might"
    word = f"{errno.errorcode.get(said.errno, str(said.errno))} ({os.strerror(said.errno)})"
    if said.can_go:
        lines = [f"{name} {could} go offline now"]
    elif said.state != "online":
        lines = [f"{name} is {said.state} already: {word}"]
    else:
        lines = [f"{name} {could} not go offline now: {word}"]
    if not said.certain:
        lines[0] += "; that is not certain"
    last = said.start_pfn + said.nr_pages - 1
    zone = f"zone {said.zone}" if said.zone is not None else "no single zone"
    lines.append(f"node {said.node}, {zone}, pfns {said.start_pfn:#x} to {last:#x}")
    along = ", ".join(f"{what} {n}" for what, n in said.goes_along.items())
    if along:
        lines.append(f"goes along: {along}")
    if said.moves:
        lines.append(f"would move: {counted(said.nr_to_move, 'page')}")
        lines += [f"  {n} of {user!r} ({kind})" for (user, kind), n in said.moves.items()]
    lines += _room_lines(said)
    if said.obstacles:
        lines.append("in the way:")
        for group in _group(said.obstacles):
            lines += _obstacle_lines(group)
    if said.assumptions:
        lines.append("assumed:")
        lines += [f"  {text}" for text in said.assumptions]
    return lines


def _room_lines(said: Explanation) -> list[str]:
    room = said.room
    if room is None:
        return []
    nodes = ",".join(str(n) for n in room.nodemask)
    head = f"room: {room.sure} to {room.most} pages, gfp {room.gfp:#x}, nodes {nodes}"
    if room.most_huge:
        head += f"; as huge pages up to {room.most_huge} more"
    return [head] + [
        f"  node {t.nid} zone {t.zone}: {t.free} free, {t.sure} to {t.most} above the marks"
        + (", for huge pages only" if t.huge_only else "")
        for t in room.targets
    ]
