"""Numbers and sizes in messages."""

from __future__ import annotations

_UNITS = ("TiB", "GiB", "MiB", "KiB")


def counted(n: int, noun: str) -> str:
    """Return a number and what it counts: ``1 page``, ``2 pages``, ``0 huge pages of 2048 kB``.

    :param noun: in the singular; its plural is made at its end, or before ``" of "``.
    """
    head, of, rest = noun.partition(" of ")
    if n != 1:
        head = head[:-1] + "ies" if head.endswith("ry") else head + "s"
    return f"{n} {head}{of}{rest}"


def sized(nbytes: int) -> str:
    """Return a number of bytes in the largest unit that it is a multiple of: ``1 TiB``."""
    for shift, unit in zip((40, 30, 20, 10), _UNITS, strict=True):
        if nbytes and not nbytes & ((1 << shift) - 1):
            return f"{nbytes >> shift} {unit}"
    return counted(nbytes, "byte")


def about(nbytes: int) -> str:
    """Return about how much a number of bytes is, in the largest unit that it has: ``17.8 GiB``."""
    for shift, unit in zip((40, 30, 20, 10), _UNITS, strict=True):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):.1f} {unit}".replace(".0 ", " ")
    return counted(nbytes, "byte")
