"""Files of machines that nobody recorded: many nodes, nodes without memory, CXL, large blocks."""

from __future__ import annotations

from collections.abc import Collection

GIB, PAGE, BLOCK = 1 << 30, 4096, 128 << 20
_NODE, _MEMORY = "/sys/devices/system/node/", "/sys/devices/system/memory/"


def _zone(nid: int, name: str, start: int, spanned: int, present: int, free: int) -> str:
    text = (
        f"Node {nid}, zone {name:>8}\n  pages free     {free}\n        min      100\n"
        f"        low      200\n        high     300\n        spanned  {spanned}\n"
        f"        present  {present}\n        managed  {present}\n"
        "        protection: (0, 0, 0, 0, 0)\n"
    )
    if not present:
        return text
    return text + (
        f"      nr_free_pages {free}\n  pagesets\n    cpu: 0\n              count: 3\n"
        "              high:  378\n              batch: 63\n  vm stats threshold: 10\n"
        f"  node_unreclaimable:  0\n  start_pfn:           {start}\n"
    )


def _low(block: int) -> tuple[str, str, dict[str, str]]:
    """The first 2 GiB, of node 0."""
    iomem = "00001000-0009ffff : System RAM\n00100000-7fffffff : System RAM\n"
    zones = _zone(0, "DMA", 1, 4095, 0xF9F, 3000)
    zones += _zone(0, "DMA32", 4096, 0x80000 - 4096, 0x80000 - 4096, 300000)
    files = {}
    for b in range(max(1, 2 * GIB // block)):
        base = f"{_MEMORY}memory{b}/"
        files |= {base + "state": "online", base + "node0": "link"}
        files[base + "valid_zones"] = "DMA32" if b else "none"
    return iomem, zones, files


def machine(
    nodes: int,
    gib: int = 2,
    block: int = BLOCK,
    kmem: Collection[int] = (),
    without_memory: Collection[int] = (),
    offline: Collection[int] = (),
    cpus: int = 2,
    iomem: str = "",
) -> dict[str, str]:
    """Return files of a machine whose node N has ``gib`` GiB from (4 + N * gib) GiB on.

    :param block: bytes of a memory block; offline: numbers of blocks.
    :param kmem: nodes whose memory is behind a CXL window, in zone Movable, without CPUs.
    :param iomem: further lines.
    """
    text, zones, files = _low(block)
    for nid in range(nodes):
        own = "" if nid in kmem else f"{nid * cpus}-{nid * cpus + cpus - 1}"
        files[f"{_NODE}node{nid}/cpulist"] = own
        if nid in without_memory:
            continue
        if nid:
            zones += _zone(nid, "DMA", 0, 0, 0, 0) + _zone(nid, "DMA32", 0, 0, 0, 0)
        start, size = (4 + nid * gib) * GIB, gib * GIB
        blocks = range(start // block, (start + size) // block)
        pages = (size - block * len(set(blocks) & set(offline))) // PAGE
        name = "Movable" if nid in kmem else "Normal"
        for zone in ("Normal", "Movable", "Device"):
            here = (start // PAGE, size // PAGE, pages, pages // 2)
            zones += _zone(nid, zone, *(here if zone == name else (0, 0, 0, 0)))
        span = f"{start:x}-{start + size - 1:x}"
        if nid in kmem:
            names = (f"CXL Window {nid}", f"region{nid}", f"dax{nid}.0", "System RAM (kmem)")
            text += "".join(f"{'  ' * i}{span} : {what}\n" for i, what in enumerate(names))
        else:
            text += f"{span} : System RAM\n"
        for b in blocks:
            base = f"{_MEMORY}memory{b}/"
            files[base + "state"] = "offline" if b in offline else "online"
            files[base + "valid_zones"] = "Normal Movable" if b in offline else name
            files[f"{base}node{nid}"] = "link"
    there = f"0-{nodes - 1}" if nodes > 1 else "0"
    return files | {
        "/proc/iomem": text + iomem,
        "/proc/zoneinfo": zones,
        _MEMORY + "block_size_bytes": f"{block:x}",
        _NODE + "possible": there,
        _NODE + "online": there,
    }
