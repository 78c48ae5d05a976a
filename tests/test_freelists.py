"""Free lists and pageblock types that files describe."""

from __future__ import annotations

from kmm import Machine
from tests.conftest import recording

TYPES = "Node 0, zone    DMA32 {:12} {:12} {:12} {:12} {:12} "


def test_pageblocks_reserved_for_atomic_requests_are_counted() -> None:
    data = recording("watermarks")
    files = dict(data["steps"][0]["files"])
    text = files["/proc/pagetypeinfo"]
    assert TYPES.format(52, 446, 6, 0, 0) in text
    files["/proc/pagetypeinfo"] = text.replace(
        TYPES.format(52, 446, 6, 0, 0), TYPES.format(50, 446, 6, 2, 0)
    )
    m = Machine.from_files(files, data["machine"])
    assert m.nodes[0].zone(1).nr_reserved_highatomic == 2 * 512
    m.validate()
