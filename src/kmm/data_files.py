"""Reads TOML and JSON files, with one message for whatever is wrong in them."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

from kmm.errors import ConfigError, shown

#: Bytes of a file; a machine.json of all the texts that an import takes is half as long.
MAX_DATA = 1 << 30
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def load_data(path: str | os.PathLike[str]) -> Any:
    """Read a TOML file (named ``.toml``, in whatever case) or a JSON file (all others).

    :raises ConfigError: if it cannot be read or parsed, with the format and the place in it.
    """
    file = Path(path)
    kind = "TOML" if file.suffix.lower() == ".toml" else "JSON"
    try:
        with open(file, "rb") as stream:
            read = stream.read(MAX_DATA + 1)
        if len(read) > MAX_DATA:
            raise ConfigError(f"{file}: more than {MAX_DATA >> 20} MiB")
        # Some editors begin a file with a byte order mark, or end lines with CR LF.
        text = read.decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
        raise ConfigError(f"{file}: {reason}") from None
    try:
        if kind == "TOML":
            data = tomllib.loads(text)
        else:
            data = json.loads(text, object_pairs_hook=_object)
        if _SURROGATE.search(text):
            json.dumps(data, ensure_ascii=False, default=str).encode("utf-8")
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply") from None
    except ValueError as e:
        # Beside mistakes of the format: numbers of thousands of digits, halves of characters.
        raise ConfigError(f"{file}: read as {kind}: {e}") from None
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of a JSON file, which may name each of its keys once."""
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} is there twice in one object")
            seen.add(key)
    return out
