"""The comparison itself: equal is equal, and every kind of difference is seen."""

from __future__ import annotations

import copy

import pytest

from kmm.replay import replay
from kmm.verify import compare, compare_calls
from tests.conftest import recording

PATHS = {
    "iomem": "/proc/iomem",
    "sysfs memory": "/sys/devices/system/memory/memory33/state",
    "sysfs node": "/sys/devices/system/node/has_memory",
    "tunables": "/proc/sys/vm/min_free_kbytes",
    "kthreads": "kthreads",
}


@pytest.mark.parametrize("cls", sorted(PATHS))
def test_a_changed_file_is_a_difference_of_its_class(cls: str) -> None:
    real = recording("movable_node")
    model = replay(real)
    text = model["steps"][2]["files"][PATHS[cls]]
    model["steps"][2]["files"][PATHS[cls]] = text.replace(text.split()[-1], "9x9")
    score = compare(real, model)
    assert not score.perfect
    assert score.good[cls] < score.total[cls]


def test_a_file_too_many_is_a_difference() -> None:
    real = recording("movable_node")
    model = replay(real)
    model["steps"][2]["files"]["/sys/devices/system/memory/memory99/state"] = "online"
    assert not compare(real, model).perfect


def test_unstable_facts_and_later_steps_are_left_out() -> None:
    real = copy.deepcopy(recording("movable_node"))
    model = replay(real)
    model["steps"][2]["files"]["kthreads"] = "none"
    assert not compare(real, model).perfect
    real["unstable"] = [[2, "kthreads", "running"]]
    assert compare(real, model).perfect
    model["steps"][5]["files"]["kthreads"] = "none"
    real["score_until"] = 5
    assert compare(real, model).perfect


def test_call_chains_compare_callers_and_order() -> None:
    real = [[0, "a", 1], [1, "b", 3], [1, "c", 1]]
    assert compare_calls(real, real) == (3, 3)
    assert compare_calls(real, [[0, "a", 1], [1, "c", 1], [1, "b", 1]]) == (2, 3)
    assert compare_calls(real, [[0, "b", 1], [0, "c", 1]]) == (0, 3)
