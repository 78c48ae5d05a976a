"""What the steps of scenarios and recordings hold: fields, kinds, limits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from kmm.config import MAX_CPUS
from kmm.errors import ConfigError, shown
from kmm.failure_orders import ERRNOS
from kmm.gfp import GFP_ATOMIC, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_USER
from kmm.memory import KINDS, SINGLE_PAGES, THP_CHOICES
from kmm.mempolicy import MODES
from kmm.notifiers import INJECTABLE
from kmm.params import (
    MAX_ORDER,
    NR_PAGES_MAX,
    PAGE_SIZE,
    PFN_SECTION_SHIFT,
    USER_ANON,
    USER_FILE,
    USER_SHMEM,
    parse_size,
)
from kmm.trace import FALLIBLE, NTH_MAX

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
    "users": (1, 10000),
    "cpu": (0, MAX_CPUS - 1),
    "seed": (0, (1 << 64) - 1),
    "block": (0, (NR_PAGES_MAX >> PFN_SECTION_SHIFT) - 1),
    "nth": (1, NTH_MAX),
}


_WORDS: dict[str, Collection[str]] = {
    "policy": MODES,
    "load kind": (*KINDS, "hugetlb", "hugetlb_user"),
    "kind": (*KINDS, "hugetlb"),
    "thp": THP_CHOICES,
    "event": INJECTABLE,
    "errno": ERRNOS,
    "function": FALLIBLE,  # those of the modules that are imported by then
}
#: Kinds that are files.
FILE_KINDS = frozenset((USER_FILE, USER_SHMEM))
_HUGETLB_SIZES = (2 << 20, 1 << 30)


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a step: its name, kind, and whether it has to be there."""

    name: str
    kind: str
    needed: bool = True


# How much: one of these.
_AMOUNT = (
    Field("pages", "pages", False),
    Field("size", "size", False),
    Field("share", "share", False),
)
SCHEMA: dict[str, tuple[Field, ...]] = {
    "plug": (
        Field("id", "id"),
        Field("node", "node"),
        Field("addr", "size"),
        Field("size", "size"),
    ),
    "unplug": (Field("id", "id"),),
    "write": (Field("path", "text"), Field("value", "text")),
    "read": (Field("path", "text"),),
    "pages": (Field("pfn", "pfn"), Field("count", "pages")),
    "sh": (Field("line", "text"), Field("load", "load", False)),
    "alloc": (
        Field("id", "id"),
        Field("count", "pages"),
        Field("order", "order", False),
        Field("gfp", "gfp", False),
        Field("node", "node", False),
    ),
    "free": (Field("id", "id"),),
    "user": (
        Field("id", "id"),
        *_AMOUNT,
        Field("kind", "kind", False),
        Field("count", "users", False),
        Field("policy", "policy", False),
        Field("nodes", "nodes", False),
        Field("cpuset", "text", False),
        Field("cpu", "cpu", False),
        Field("order", "order", False),
        Field("thp", "thp", False),
        Field("lock", "flag", False),
        Field("tokens", "flag", False),
        Field("page_size", "huge size", False),
        Field("reserve", "flag", False),
    ),
    "balloon": (
        Field("id", "id"),
        *_AMOUNT,
        Field("movable", "flag", False),
        Field("unmanaged", "flag", False),
    ),
    "grow": (Field("id", "id"), *_AMOUNT),
    "shrink": (Field("id", "id"), *_AMOUNT),
    "touch": (Field("id", "id"), *_AMOUNT, Field("seed", "seed", False)),
    "churn": (Field("id", "id"), *_AMOUNT, Field("seed", "seed", False)),
    "fwrite": (Field("id", "id"), *_AMOUNT, Field("first", "pages", False)),
    "fread": (Field("id", "id"), *_AMOUNT, Field("first", "pages", False)),
    "truncate": (Field("id", "id"), Field("first", "pages", False)),
    "pin": (
        Field("id", "id"),
        Field("first", "pages", False),
        Field("pages", "pages", False),
        Field("long", "flag", False),
    ),
    "unpin": (Field("id", "id"),),
    "close": (Field("id", "id"),),
    "cpuset": (Field("id", "id"), Field("nodes", "nodes"), Field("parent", "text", False)),
    "hugetlb": (
        Field("page_size", "huge size", False),
        Field("count", "pages", False),
        Field("nodes", "nodes", False),
        Field("overcommit", "pages", False),
    ),
    "busy": (Field("block", "block"),),
    "veto": (Field("event", "event"), Field("errno", "errno"), Field("block", "block", False)),
    "fail": (Field("function", "function"), Field("errno", "errno"), Field("nth", "nth", False)),
    "forget": (),
    "boot": (),
}
# What the load of a sh step can hold, for each kind: pages, or size and count.
LOAD_FIELDS = (
    Field("kind", "load kind"),
    Field("user", "text", False),
    Field("file", "text", False),
    Field("pages", "pages", False),
    Field("size", "size", False),
    Field("count", "pages", False),
    Field("policy", "policy", False),
    Field("nodes", "nodes", False),
    Field("thp", "flag", False),
    Field("lock", "flag", False),
    Field("free", "flag", False),
    Field("touch", "pages", False),
    Field("tokens", "flag", False),
)
# What a recording of a real kernel can hold.
RECORDED = ("boot", "plug", "unplug", "write", "sh", "pages")
# What every step can have besides: a label, whether to record its call chain, and what only the
# recorder of a real kernel heeds.
_COMMON = (
    Field("name", "text", False),
    Field("trace", "flag", False),
    Field("snap", "flag", False),
    Field("keep", "flag", False),
    Field("timeout", "seconds", False),
)


def _allowed(kind: str) -> str:
    if kind in _NUMBERS:
        return "a number from {} to {}".format(*_NUMBERS[kind])
    return {
        "text": "text",
        "id": "text that is not empty",
        "flag": "true or false",
        "seconds": "a number of seconds above 0",
        "size": "bytes as a number below 2^64, or text like '512M' or '0x100000000'",
        "huge size": "2M, 1G",
        "gfp": ", ".join(GFP_WORDS),
        "share": "a part of the memory, above 0 and up to 1",
        "load": "an object with 'kind', or a list of such",
        "nodes": "a list of node numbers",
        **{name: ", ".join(words) for name, words in _WORDS.items()},
        "errno": "the name of an errno, such as EBUSY, ENOMEM, EIO",
        "function": ", ".join(sorted(FALLIBLE)),
    }[kind]


def _value(value: Any, kind: str, where: str, others: bool = False) -> Any:
    number = isinstance(value, int) and not isinstance(value, bool)
    if kind == "flag":
        ok = isinstance(value, bool)
    elif kind == "seconds":
        ok = (number or isinstance(value, float)) and value > 0
    elif kind in _NUMBERS:
        low, high = _NUMBERS[kind]
        ok = number and low <= value <= high
    elif kind == "size":
        value = parse_size(value, where)
        ok = value <= _SIZE_MAX
    elif kind == "huge size":
        value = parse_size(value, where)
        ok = value in _HUGETLB_SIZES
    elif kind == "share":
        ok = (number or isinstance(value, float)) and 0 < value <= 1
    elif kind == "load":
        return check_load(value, where, others)
    elif kind == "nodes":
        ok = isinstance(value, list) and all(
            isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _NUMBERS["node"][1]
            for n in value
        )
    elif kind in _WORDS:
        ok = isinstance(value, str) and value in _WORDS[kind]
    elif kind == "id":
        ok = isinstance(value, str) and value != ""
    else:
        ok = isinstance(value, str) and (kind == "text" or value in GFP_WORDS)
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
    if "op" not in step:
        raise ConfigError(f"{where}.op: missing; allowed: {', '.join(sorted(ops))}")
    if not isinstance(op, str) or op not in ops:
        raise ConfigError(f"{where}.op: {shown(op)}; allowed: {', '.join(sorted(ops))}")
    checked = _check_fields(step, (*SCHEMA[op], *_COMMON), where, others, ("op",))
    if "share" in {f.name for f in SCHEMA[op]}:
        _check_one_amount(checked, op in ("user", "balloon"), where)
    if op == "user":
        _check_user(checked, where)
    elif op == "hugetlb":
        _check_pool(checked, where)
    return {"op": op} | checked


def _check_one_amount(step: Mapping[str, Any], needed: bool, where: str) -> None:
    names = [f.name for f in _AMOUNT if f.name in step]
    if len(names) > 1 or (needed and not names):
        have = f"{names[-1]}: {shown(step[names[-1]])}" if names else "pages: missing"
        raise ConfigError(f"{where}.{have}; allowed: one of pages, size and share")
    check_blocks(step, order_of(step), where)


def order_of(made: Mapping[str, Any]) -> int:
    """Return the order of the blocks of a user that a checked step makes."""
    if made.get("kind") == "hugetlb":
        size: int = made.get("page_size", _HUGETLB_SIZES[0])
        return (size // PAGE_SIZE).bit_length() - 1
    return int(made.get("order", 0))


def check_blocks(step: Mapping[str, Any], order: int, where: str) -> None:
    """Check that what a step is about is a block at least, if it says that in pages or bytes.

    :param order: of the user's blocks.
    :raises ConfigError: naming the step, the field, its value and what is allowed.
    """
    if step.get("size", PAGE_SIZE << order) < PAGE_SIZE << order:
        least = f"from {PAGE_SIZE << order} bytes on, a {_block_name(order)}"
        raise ConfigError(f"{where}.size: {step['size']}; allowed: {least}")
    if order and step.get("pages", 1 << order) < 1 << order:
        least = f"from {1 << order} on, a {_block_name(order)}"
        raise ConfigError(f"{where}.pages: {step['pages']}; allowed: {least}")


def _block_name(order: int) -> str:
    return f"block of order {order}" if order else "page"


def _check_user(step: Mapping[str, Any], where: str) -> None:
    """Check what the fields of a user say together: its kind has what they ask for."""
    kind = step.get("kind", "anon")
    huge, number = kind == "hugetlb", KINDS.get(kind)
    on_lru = number in FILE_KINDS | {USER_ANON}
    has_order = not huge and number not in SINGLE_PAGES
    for name, none, has in (("order", 0, has_order), ("thp", "never", on_lru)):
        if step.get(name, none) != none and not has:
            have = f"{where}.{name}: {shown(step[name])}"
            raise ConfigError(f"{have}; allowed: {shown(none)} for kind {kind!r}")
    if step.get("lock") and not on_lru:
        raise ConfigError(f"{where}.lock: True; allowed: false for kind {kind!r}")
    for name in ("page_size", "reserve"):
        if name in step and not huge:
            have = f"{where}.{name}: {shown(step[name])}"
            raise ConfigError(f"{have}; allowed: with kind 'hugetlb', not with {kind!r}")
    _check_policy(step, where)


def _check_pool(step: Mapping[str, Any], where: str) -> None:
    """Check what a pool is told: something, and only what pages of its size can do."""
    if "count" not in step and "overcommit" not in step:
        raise ConfigError(f"{where}.count: missing; allowed: one of count and overcommit, or both")
    if "nodes" in step and "count" not in step:
        raise ConfigError(f"{where}.nodes: {shown(step['nodes'])}; allowed: with a count")
    if "overcommit" in step and step.get("page_size") == _HUGETLB_SIZES[1]:
        have = f"{where}.overcommit: {step['overcommit']}"
        raise ConfigError(f"{have}; allowed: with pages of 2M, those of 1G are never surplus")


def _check_fields(
    data: Mapping[str, Any],
    fields: Collection[Field],
    where: str,
    others: bool,
    more: Collection[str] = (),
) -> dict[str, Any]:
    """Check an object's fields; return it with sizes as bytes."""
    known = {*more, *(f.name for f in fields)}
    for name in data:
        if not others and name not in known:
            allowed = ", ".join(sorted(known))
            raise ConfigError(
                f"{where}.{name}: {shown(data[name])}; no such field; allowed: {allowed}"
            )
    out = dict(data)
    for field in fields:
        at = f"{where}.{field.name}"
        if field.name in data:
            out[field.name] = _value(data[field.name], field.kind, at, others)
        elif field.needed:
            raise ConfigError(f"{at}: missing; allowed: {_allowed(field.kind)}")
    return out


def check_load(value: Any, where: str, others: bool = False) -> list[dict[str, Any]]:
    """Check what a step's ``load`` says, one object or a list; return a list of objects.

    :param others: whether fields that are not known are passed over.
    :raises ConfigError: naming the load, the field, its value and what is allowed.
    """
    many = isinstance(value, list)
    if not isinstance(value, list | Mapping):
        raise ConfigError(f"{where}: {shown(value)}; allowed: {_allowed('load')}")
    out = []
    for i, load in enumerate(value if many else [value]):
        at = f"{where}[{i}]" if many else where
        if not isinstance(load, Mapping):
            raise ConfigError(f"{at}: {shown(load)}; allowed: {_allowed('load')}")
        checked = _check_fields(load, LOAD_FIELDS, at, others)
        _check_amount(checked, at)
        out.append(checked)
    return out


def _check_amount(load: Mapping[str, Any], where: str) -> None:
    """Check what the fields of a load say together: how much, and of which nodes."""
    if load["kind"] == "hugetlb":
        if load.get("size") not in _HUGETLB_SIZES:
            have = shown(load["size"]) if "size" in load else "missing"
            raise ConfigError(f"{where}.size: {have}; allowed: 2M, 1G (pages of kind hugetlb)")
        if "count" not in load:
            raise ConfigError(f"{where}.count: missing; allowed: {_allowed('pages')}")
    elif not load.get("free") and "pages" not in load and "size" not in load:
        raise ConfigError(
            f"{where}.pages: missing; allowed: {_allowed('pages')}, or size and count"
        )
    _check_policy(load, where)


def _check_policy(data: Mapping[str, Any], where: str) -> None:
    """Check that a policy has nodes if it needs some, and none if it has no use for them."""
    nodes, policy = data.get("nodes", []), data.get("policy")
    if policy in ("bind", "interleave") and not nodes:
        raise ConfigError(f"{where}.nodes: {shown(nodes)}; allowed: some, with policy {policy!r}")
    if policy == "default" and nodes:
        raise ConfigError(f"{where}.nodes: {shown(nodes)}; allowed: none with policy 'default'")


def check_boot_is_first(op: str, number: int, where: str) -> None:
    """Check that a step does not boot a machine that runs.

    :param number: the step's place, 0 for the first.
    :raises ConfigError: naming the step and what is allowed.
    """
    if op == "boot" and number:
        raise ConfigError(f"{where}.op: 'boot'; allowed: in the first step only")
