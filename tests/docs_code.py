"""Finds the code of a Markdown page, and the output that the page shows of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its text, and the text block right behind it, if any."""

    language: str
    text: str
    shown: str | None


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page that are no output, each with what is shown of it."""
    found = re.findall(
        r"^```(\w+)\n(.*?)^```$(\n\n```text\n(.*?)^```$)?",
        page.read_text(encoding="utf-8"),
        re.M | re.S,
    )
    return [
        Block(lang, text, shown if more else None)
        for lang, text, more, shown in found
        if lang != "text"
    ]


def agrees(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed; a line ``...`` stands for any lines."""
    parts = [re.escape(part) for part in re.split(r"^\.\.\.\n", shown, flags=re.M)]
    printed = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
    return re.fullmatch("(?:.*\n)*".join(parts), printed) is not None


def commands(text: str) -> list[tuple[str, str]]:
    """Return the commands of a console block, each with the lines that it prints."""
    parts = re.split(r"^\$ ", text, flags=re.M)[1:]
    return [(part.partition("\n")[0], part.partition("\n")[2]) for part in parts]
