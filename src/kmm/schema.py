"""What the steps of scenarios and recordings hold: fields, kinds, limits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from kmm.errors import ConfigError, shown
from kmm.page_alloc import GFP_ATOMIC, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_USER
from kmm.params import MAX_ORDER, NR_PAGES_MAX, parse_size

GFP_WORDS = {
    "GFP_KERNEL": GFP_KERNEL,
    "GFP_ATOMIC": GFP_ATOMIC,
    "GFP_USER": GFP_USER,
    "GFP_HIGHUSER_MOVABLE": GFP_HIGHUSER_MOVABLE,
}

_SIZE_MAX = (1 << 64) - 1
_NUMBERS = {
    "node": (0, (1 << 31) - 1),
    "pfn": (0, NR_PAGES_MAX - 1),
    "pages": (0, NR_PAGES_MAX),
    "order": (0, MAX_ORDER - 1),
}


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a step: its name, kind, and whether it has to be there."""

    name: str
    kind: str
    needed: bool = True


SCHEMA: dict[str, tuple[Field, ...]] = {
    "plug": (
        Field("id", "text"),
        Field("node", "node"),
        Field("addr", "size"),
        Field("size", "size"),
    ),
    "unplug": (Field("id", "text"),),
    "write": (Field("path", "text"), Field("value", "text")),
    "read": (Field("path", "text"),),
    "pages": (Field("pfn", "pfn"), Field("count", "pages")),
    "sh": (Field("line", "text"), Field("load", "any", False)),
    "alloc": (
        Field("id", "text"),
        Field("count", "pages"),
        Field("order", "order", False),
        Field("gfp", "gfp", False),
        Field("node", "node", False),
    ),
    "free": (Field("id", "text"),),
    "boot": (),
}
# What a recording of a real kernel can hold.
RECORDED = ("boot", "plug", "unplug", "write", "sh", "pages")
_COMMON = ("op", "name", "trace", "snap", "keep", "timeout")


def _allowed(kind: str) -> str:
    if kind in _NUMBERS:
        return "a number from {} to {}".format(*_NUMBERS[kind])
    return {
        "text": "text",
        "size": "bytes as a number below 2^64, or text like '512M' or '0x100000000'",
        "gfp": ", ".join(GFP_WORDS),
    }[kind]


def _value(value: Any, kind: str, where: str) -> Any:
    number = isinstance(value, int) and not isinstance(value, bool)
    if kind in _NUMBERS:
        low, high = _NUMBERS[kind]
        ok = number and low <= value <= high
    elif kind == "size":
        value = parse_size(value, where)
        ok = value <= _SIZE_MAX
    else:
        ok = kind == "any" or (isinstance(value, str) and (kind == "text" or value in GFP_WORDS))
    if not ok:
        raise ConfigError(f"{where}: {shown(value)}; allowed: {_allowed(kind)}")
    return value


def check_step(
    step: Any, where: str, ops: Collection[str] = tuple(SCHEMA), others: bool = False
) -> dict[str, Any]:
    """Check one step and return it with sizes as bytes.

    :param where: file and step, for messages; ops: the operations that are allowed.
    :param others: whether fields that are not known are passed over.
    :raises ConfigError: naming the step, the field, its value and what is allowed.
    """
    if not isinstance(step, Mapping):
        raise ConfigError(f"{where}: {shown(step)}; allowed: an object with 'op'")
    op = step.get("op")
    if not isinstance(op, str) or op not in ops:
        raise ConfigError(f"{where}.op: {shown(op)}; allowed: {', '.join(sorted(ops))}")
    known = {f.name for f in SCHEMA[op]}
    for name in step:
        if not others and name not in known and name not in _COMMON:
            allowed = ", ".join(sorted(known | set(_COMMON)))
            raise ConfigError(
                f"{where}.{name}: {shown(step[name])}; no such field; allowed: {allowed}"
            )
    out = dict(step)
    for field in SCHEMA[op]:
        if field.name in step:
            out[field.name] = _value(step[field.name], field.kind, f"{where}.{field.name}")
        elif field.needed:
            raise ConfigError(f"{where}.{field.name}: missing; allowed: {_allowed(field.kind)}")
    return out


def check_texts(value: Any, where: str) -> None:
    """Check a list of texts.

    :raises ConfigError: naming the place, the value and what is allowed.
    """
    if not isinstance(value, list):
        raise ConfigError(f"{where}: {shown(value)}; allowed: a list of texts")
    for i, text in enumerate(value):
        if not isinstance(text, str):
            raise ConfigError(f"{where}[{i}]: {shown(text)}; allowed: text")


def check_files(value: Any, where: str) -> None:
    """Check an object of paths and texts.

    :raises ConfigError: naming the place, the value and what is allowed.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {shown(value)}; allowed: an object of paths and their texts")
    for path, text in value.items():
        if not isinstance(path, str) or not isinstance(text, str):
            raise ConfigError(f"{where}: {path}: {shown(text)}; allowed: text")
