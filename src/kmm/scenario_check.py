"""What the steps of a scenario say together: nodes, CPUs, and the names of what is there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from kmm.errors import ConfigError, shown
from kmm.memory import KIND_NAMES, KINDS
from kmm.params import USER_ANON, USER_HUGETLB, USER_SLAB_RECLAIMABLE, MachineConfig
from kmm.schema import FILE_KINDS, check_blocks, check_boot_is_first, order_of
from kmm.workload import OF_BALLOONS, OPS

_BALLOON = "balloon"
_MAPPED = FILE_KINDS | {USER_ANON}
#: What steps ask of users' kinds; all others can be done to every kind.
_KINDS_OF_OP: dict[str, Collection[int]] = {
    "churn": [kind for kind in KINDS.values() if kind >= USER_SLAB_RECLAIMABLE],
    "fwrite": FILE_KINDS,
    "fread": FILE_KINDS,
    "truncate": _MAPPED | {USER_HUGETLB},
    "pin": _MAPPED,
}


def check_together(steps: Collection[Mapping[str, Any]], config: MachineConfig, name: str) -> None:
    """Check what a step alone does not tell: nodes, CPUs, the place of boot, ids that are known.

    :param steps: each checked by schema.check_step; name: the file's, for messages.
    :raises ConfigError: naming the step, the field, its value and what is allowed.
    """
    held: set[str] = set()
    names = _Names()
    for i, step in enumerate(steps, 1):
        where = f"{name}: step {i}"
        _check_place(step, config, where)
        check_boot_is_first(step["op"], i - 1, where)
        if step["op"] == "alloc":
            held.add(step["id"])
        elif step["op"] == "free":
            if step["id"] not in held:
                allowed = "the id of an alloc before it that is not freed yet"
                raise _refuse(where, step, "id", allowed + _one_of(held))
            held.discard(step["id"])
        elif step["op"] in OPS:
            names.check(step, where)


def _refuse(where: str, step: Mapping[str, Any], key: str, allowed: str) -> ConfigError:
    return ConfigError(f"{where}.{key}: {shown(step[key])}; allowed: {allowed}")


def _one_of(there: Collection[str]) -> str:
    return f", one of {shown(sorted(there))}" if there else "; there is none"


def _check_place(step: Mapping[str, Any], config: MachineConfig, where: str) -> None:
    """Check that a step's nodes and its CPU are the machine's."""
    last = len(config.nodes) - 1
    for key, nid in [("node", step.get("node", 0)), *(("nodes", n) for n in step.get("nodes", ()))]:
        if nid > last:
            raise ConfigError(f"{where}.{key}: {nid}; allowed: 0 to {last}")
    if step.get("cpu", 0) >= config.cpus:
        raise _refuse(where, step, "cpu", f"0 to {config.cpus - 1}")
    if step.get("page_size") == 1 << 30 and not config.pdpe1gb:
        raise _refuse(where, step, "page_size", "2M, the machine has no pages of 1G")


class _Names:
    """The users, balloons and cpusets that steps have made so far, as far as that is known."""

    def __init__(self) -> None:
        self.users: dict[str, Mapping[str, Any]] = {}  # by id, the step that made them
        self.single: set[str] = set()  # what each of them is called
        self.cpusets: set[str] = set()

    def check(self, step: Mapping[str, Any], where: str) -> None:
        """Check a workload's step, and note what it makes.

        :raises ConfigError: naming the step, the field, its value and what is allowed.
        """
        for key in ("cpuset", "parent"):
            if key in step and step[key] not in self.cpusets:
                raise _refuse(where, step, key, "a cpuset before it" + _one_of(self.cpusets))
        if step["op"] == "cpuset":
            self.cpusets.add(step["id"])
        elif step["op"] == "hugetlb":
            return  # a pool is no user
        elif step["op"] in ("user", "balloon"):
            if step["id"] in self.users or not self.single.isdisjoint(_names_of(step)):
                raise _refuse(where, step, "id", "one that is not in use")
            self.users[step["id"]] = step
            self.single.update(_names_of(step))
        elif step["id"] not in self.users:
            allowed = "the id of a user before it" + _one_of(self.users)
            raise _refuse(where, step, "id", allowed)
        else:
            made = self.users[step["id"]]
            _check_kind(step, made, where)
            check_blocks(step, order_of(made), where)
            if step["op"] == "close":
                del self.users[step["id"]]
                self.single.difference_update(_names_of(made))


def _names_of(made: Mapping[str, Any]) -> Iterator[str]:
    count = made.get("count", 1)
    if count == 1:
        return iter((made["id"],))
    return (f"{made['id']}.{i}" for i in range(1, count + 1))


def _check_kind(step: Mapping[str, Any], made: Mapping[str, Any], where: str) -> None:
    """Check that what a step does can be done to the kind of its user."""
    op = step["op"]
    if made["op"] == _BALLOON:
        if op not in OF_BALLOONS:
            raise _refuse(where, step, "op", f"{', '.join(OF_BALLOONS)} of a balloon")
        return
    kind = made.get("kind", "anon")
    kinds = _KINDS_OF_OP.get(op)
    if kinds is not None and KINDS.get(kind, USER_HUGETLB) not in kinds:
        names = ", ".join(KIND_NAMES[k] for k in sorted(kinds))
        allowed = f"a user of kind {names} for {op}"
        raise ConfigError(f"{where}.id: {shown(step['id'])}, of kind {kind}; allowed: {allowed}")
