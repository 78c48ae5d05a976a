"""The texts of a machine that was saved: shown as they were, and counting on from there.

A kernel other than 6.1 shows other lines, and counters that are read one file after the other
disagree a little.  So a saved machine's file is shown as it was saved until what kmm makes of it
changes.  From then on its lines keep their form: counters go on from the saved number by what the
model's has moved since, counts of free blocks that moved are the model's, lines that kmm does not
know stay, and a zone that gets or loses its pages is shown as kmm shows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

Sections = dict[str, dict[str, str]]  # what a section and a line are about, the line

_NUMBER = re.compile(r"(?<![\w.])>?-?[0-9]+(?!\w)")
_PADDED = re.compile(r"( *)((?<![\w.])>?-?[0-9]+(?!\w))")
_NODE_FILE = r"/sys/devices/system/node/node[0-9]+/"
_COUNTERS = re.compile(
    r"/proc/(?:meminfo|vmstat|zoneinfo)|" + _NODE_FILE + r"(?:meminfo|vmstat|numastat)"
)
_FREE_BLOCKS = re.compile(r"/proc/(?:buddyinfo|pagetypeinfo)")
_RIGHT = re.compile(r".*/(?:meminfo|buddyinfo|pagetypeinfo)")
_ZONE = re.compile(r"Node +[0-9]+, zone")


@dataclass(frozen=True, slots=True)
class Difference:
    """A line of a file that kmm would make otherwise: None where there is no such line."""

    path: str
    saved: str | None
    model: str | None


def _subject(line: str) -> str:
    return " ".join(_NUMBER.sub("#", line).split())


def _sections(path: str, text: str) -> Sections:
    """Take a text apart; every line is found again by what it is about."""
    out: Sections = {}
    head = ""
    seen: dict[tuple[str, str], int] = {}
    by_line = _FREE_BLOCKS.fullmatch(path) is not None
    for line in text.rstrip("\n").split("\n"):
        name = _subject(line)
        if _ZONE.match(line) and (by_line or path == "/proc/zoneinfo"):
            # Numbers behind the zone's name are counts; the node's number tells zones apart.
            zone = re.match(r"Node +([0-9]+), zone +(\w+)(?:, type +(\w+))?", line)
            head = " ".join(filter(None, zone.groups())) if zone else line
            head += " blocks" if path == "/proc/pagetypeinfo" and "type" not in line else ""
        elif by_line:
            # Titles come once for each node, and have to stay where they are.
            n = seen["", name] = seen.get(("", name), 0) + 1
            out[f"{name}/{n}"] = {"": line}
            continue
        n = seen[head, name] = seen.get((head, name), 0) + 1
        out.setdefault(head, {})[f"{name}/{n}"] = line
    return out


class SavedText:
    """One file: what was saved, and what kmm made of it when the machine was built."""

    def __init__(self, path: str, saved: str, built: str) -> None:
        self.path = path
        self.saved = saved.rstrip("\n") + "\n" * built.endswith("\n")
        self.built = built

    def shown(self, now: str) -> str:
        """Return the text that is shown, given what kmm makes of the file now."""
        if now == self.built:
            return self.saved
        counters = _COUNTERS.fullmatch(self.path) is not None
        if not counters and not _FREE_BLOCKS.fullmatch(self.path):
            return now
        saved, built, model = (_sections(self.path, t) for t in (self.saved, self.built, now))
        lines: list[str] = []
        for head in _order(list(saved), list(model)):
            if head not in model:
                if head not in built:
                    lines += saved[head].values()
            elif head not in saved or model[head].keys() != built.get(head, {}).keys():
                lines += model[head].values()
            else:
                for name, line in saved[head].items():
                    if name in model[head]:
                        line = self._line(line, built[head][name], model[head][name], counters)
                    lines.append(line)
        return "\n".join(lines) + "\n"

    def _line(self, saved: str, built: str, now: str, counters: bool) -> str:
        if now == built:
            return saved
        if saved == built:
            return now
        before, after = _NUMBER.findall(built), _NUMBER.findall(now)
        if not len(before) == len(after) == len(_NUMBER.findall(saved)):
            return now
        pairs = iter(zip(before, after, strict=True))
        right = _RIGHT.fullmatch(self.path) is not None

        def replace(match: re.Match[str]) -> str:
            was, now = next(pairs)
            if was == now:
                return match[0]
            if counters:
                now = str(max(0, int(match[2].lstrip(">")) + int(now) - int(was)))
            gap = match[1]
            width = len(match[0]) - len(gap[:1]) if right else 0
            return (gap[:1] if right else gap) + str(now).rjust(width)

        return _PADDED.sub(replace, saved)

    def differences(self) -> Iterator[Difference]:
        """Yield the lines that kmm would make otherwise, first those of the saved text."""
        saved, built = _sections(self.path, self.saved), _sections(self.path, self.built)
        for head, lines in saved.items():
            for name, line in lines.items():
                other = built.get(head, {}).get(name)
                if line.split() != (other or "").split():
                    yield Difference(self.path, _said(head, line), _said(head, other))
        for head, lines in built.items():
            for name, line in lines.items():
                if name not in saved.get(head, {}) and line.strip():
                    yield Difference(self.path, None, _said(head, line))


def _said(head: str, line: str | None) -> str | None:
    """Return a line as a list of differences shows it: with its zone, on one line."""
    if line is None:
        return None
    text = " ".join(line.split())
    return f"node {head}: {text}" if re.match(r"[0-9]+ \w+$", head) else text


def _order(saved: list[str], model: list[str]) -> list[str]:
    """Return all sections: the saved ones in their order, new ones behind their predecessor."""
    out = list(saved)
    before = ""
    for head in model:
        if head not in saved:
            out.insert(out.index(before) + 1 if before in out else len(out), head)
        before = head
    return out
