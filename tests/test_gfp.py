"""Flags of requests: one numbering for Python and the engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kmm import gfp
from kmm.mmflags import gfp_flag_names

ENGINE = Path(gfp.__file__).with_name("_gfp.pxd")


def test_the_engine_numbers_them_alike() -> None:
    rows = re.findall(r"^    (GFP_\w+) = (\w+)$", ENGINE.read_text(), re.MULTILINE)
    assert len(rows) > 20
    for name, value in rows:
        known = name.replace("GFP_BIT_", "__GFP_")
        assert int(value, 16) == getattr(gfp, known), name


@pytest.mark.parametrize(
    ("flags", "zone"),
    [
        (gfp.GFP_KERNEL, 2),
        (gfp.GFP_KERNEL | gfp.__GFP_MOVABLE, 2),
        (gfp.GFP_HIGHUSER, 2),
        (gfp.GFP_HIGHUSER_MOVABLE, 3),
        (gfp.GFP_KERNEL | gfp.GFP_DMA32, 1),
        (gfp.GFP_HIGHUSER_MOVABLE | gfp.GFP_DMA, 0),
    ],
)
def test_the_highest_zone_that_a_request_may_use(flags: int, zone: int) -> None:
    assert gfp.gfp_zone(flags) == zone


def test_composed_flags_are_the_kernels_numbers_and_print_as_one_name() -> None:
    numbers = {"GFP_KERNEL": 0xCC0, "GFP_ATOMIC": 0xA20, "GFP_NOWAIT": 0x800, "GFP_USER": 0x100CC0}
    numbers |= {"GFP_HIGHUSER": 0x100CC2, "GFP_HIGHUSER_MOVABLE": 0x100CCA}
    numbers |= {"GFP_TRANSHUGE": 0x1C24CA, "GFP_TRANSHUGE_LIGHT": 0x1C20CA}
    for name, number in numbers.items():
        assert getattr(gfp, name) == number
        assert gfp_flag_names(number) == name
