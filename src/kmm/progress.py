"""How long work says how far it is, to whoever wants to know."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

#: Is told how many there are and what they are called (``file``); while it is entered, its function
#: takes how many are done, and in words what is next.
Bar = Callable[[int, str], AbstractContextManager[Callable[[int, str], None]]]


@contextlib.contextmanager
def no_bar(total: int, what: str) -> Iterator[Callable[[int, str], None]]:
    """Take what is said of progress, and tell nobody."""
    yield lambda number, words: None
