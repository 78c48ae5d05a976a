"""One entry of the modelled tree: a file with its handlers, a link, or a directory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kmm.machine import Machine

Reader = Callable[["Machine"], str]
Writer = Callable[["Machine", str], None]


@dataclass(frozen=True, slots=True)
class Entry:
    """A file (read and/or write set), a link (link set) or a directory (names set)."""

    mode: int = 0o444
    read: Reader | None = None
    write: Writer | None = None
    link: str | None = None
    names: tuple[str, ...] | None = None
    proc: bool = False


def directory(names: Iterable[str]) -> Entry:
    """A directory with these names in it."""
    return Entry(mode=0o755, names=tuple(names))


def readonly(read: Reader) -> Entry:
    """A file that can only be read (0444)."""
    return Entry(read=read)


def link(target: str) -> Entry:
    """A symbolic link."""
    return Entry(mode=0o777, link=target)
