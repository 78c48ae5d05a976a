"""What the kernel logs of memory when there is none (mm/page_alloc.c, lib/show_mem.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmm.mmflags import gfp_flag_names
from kmm.mmzone import PgData, Zone
from kmm.page_writeback import nr_dirty
from kmm.params import MAX_ORDER, format_list
from kmm.trace import traced
from kmm.vmscan import MAX_RECLAIM_RETRIES, kswapd_failures
from kmm.vmstat import all_node_items, node_items, zone_items

if TYPE_CHECKING:
    from kmm.machine import Machine

_LETTERS = "UMEHI"
_NOWARN, _DMA = 0x2000, 0x1


def nodemask_text(nodes: int) -> str:
    """Return a mask of nodes as log lines have it, ``(null)`` for all."""
    if nodes == (1 << 64) - 1:
        return "(null)"
    return format_list([nid for nid in range(64) if nodes >> nid & 1])


def mems_allowed(m: Machine) -> str:
    """Return the cpuset and the nodes of whoever asks, as log lines have them."""
    return f"cpuset=/,mems_allowed={format_list(sorted(m.top_cpuset_mems or m.n_memory))}"


@traced
def warn_alloc(m: Machine, gfp: int, order: int, nodes: int) -> None:
    """Log that a request failed, and what memory is like, unless it was done just now.

    :param nodes: bit k lets node k give.
    """
    if gfp & _NOWARN or not m.nopage_ratelimit.allows(m.clock.now):
        return
    if gfp & _DMA and not any(z.managed_pages for z in m.all_zones() if z.zone_idx == 0):
        return
    m.printk(
        f"{comm(m)}: page allocation failure: order:{order}, "
        f"mode:{gfp:#x}({gfp_flag_names(gfp)}), nodemask={nodemask_text(nodes)},{mems_allowed(m)}"
    )
    show_mem(m, nodes)


def comm(m: Machine) -> str:
    """Return the name of the task that runs."""
    return m.current.name[:15] if m.current is not None else "kmm"


@traced
def show_mem(m: Machine, nodes: int) -> None:
    """Log what memory there is on the nodes of a mask."""
    m.printk("Mem-Info:")
    for line in _total_lines(m):
        m.printk(line)
    shown = [m.nodes[nid] for nid in sorted(m.n_online) if nodes >> nid & 1]
    for pgdat in shown:
        m.printk(_node_line(m, pgdat))
    zones = [z for p in shown for z in p.zones if z.populated]
    for zone in zones:
        m.printk(_zone_line(m, zone))
        m.printk("lowmem_reserve[]: " + " ".join(str(n) for n in zone.lowmem_reserve))
    for zone in zones:
        m.printk(_free_line(zone))
    for pgdat in shown:
        m.printk(
            f"Node {pgdat.node_id} hugepages_total=0 hugepages_free=0 hugepages_surp=0 "
            "hugepages_size=2048kB"
        )
    m.printk(f"{all_node_items(m)['nr_file_pages']} total pagecache pages")
    m.printk("0 pages in swap cache")
    free, total = (m.swap.nr_free, m.swap.pages) if m.swap is not None else (0, 0)
    m.printk(f"Free swap  = {free * 4}kB")
    m.printk(f"Total swap = {total * 4}kB")
    present = sum(z.present_pages for z in m.all_zones())
    managed = sum(z.managed_pages for z in m.all_zones())
    m.printk(f"{present} pages RAM")
    m.printk("0 pages HighMem/MovableOnly")
    m.printk(f"{present - managed} pages reserved")
    if m.config.memory_failure:
        m.printk(f"{m.num_poisoned_pages} pages hwpoisoned")


def _total_lines(m: Machine) -> list[str]:
    s = all_node_items(m)
    free = sum(z.nr_free_pages for z in m.all_zones())
    pcp = sum(z.pcp_pages() for z in m.all_zones())
    return [
        f"active_anon:{s['nr_active_anon']} inactive_anon:{s['nr_inactive_anon']} "
        f"isolated_anon:{s['nr_isolated_anon']}",
        f" active_file:{s['nr_active_file']} inactive_file:{s['nr_inactive_file']} "
        f"isolated_file:{s['nr_isolated_file']}",
        f" unevictable:{s['nr_unevictable']} dirty:{nr_dirty(m)} writeback:{s['nr_writeback']}",
        f" slab_reclaimable:{s['nr_slab_reclaimable']} "
        f"slab_unreclaimable:{s['nr_slab_unreclaimable']}",
        f" mapped:{s['nr_mapped']} shmem:{s['nr_shmem']} pagetables:{s['nr_page_table_pages']}",
        " sec_pagetables:0 bounce:0",
        f" kernel_misc_reclaimable:{s['nr_kernel_misc_reclaimable']}",
        f" free:{free} free_pcp:{pcp} free_cma:0",
    ]


def _node_line(m: Machine, pgdat: PgData) -> str:
    s = node_items(m, pgdat)
    hopeless = kswapd_failures(m, pgdat.node_id) >= MAX_RECLAIM_RETRIES
    return (
        f"Node {pgdat.node_id} active_anon:{s['nr_active_anon'] * 4}kB "
        f"inactive_anon:{s['nr_inactive_anon'] * 4}kB active_file:{s['nr_active_file'] * 4}kB "
        f"inactive_file:{s['nr_inactive_file'] * 4}kB unevictable:{s['nr_unevictable'] * 4}kB "
        f"isolated(anon):{s['nr_isolated_anon'] * 4}kB "
        f"isolated(file):{s['nr_isolated_file'] * 4}kB mapped:{s['nr_mapped'] * 4}kB "
        f"dirty:{s['nr_dirty'] * 4}kB writeback:{s['nr_writeback'] * 4}kB "
        f"shmem:{s['nr_shmem'] * 4}kB shmem_thp: {s['nr_shmem_hugepages'] * 2048}kB "
        f"shmem_pmdmapped: {s['nr_shmem_pmdmapped'] * 2048}kB "
        f"anon_thp: {s['nr_anon_transparent_hugepages'] * 2048}kB writeback_tmp:0kB "
        f"kernel_stack:{s['nr_kernel_stack']}kB pagetables:{s['nr_page_table_pages'] * 4}kB "
        f"sec_pagetables:0kB all_unreclaimable? {'yes' if hopeless else 'no'}"
    )


def _zone_line(m: Machine, zone: Zone) -> str:
    s = zone_items(zone)
    local = zone.pcp_state(m.this_cpu)[0]
    rows = {
        "free": zone.nr_free_pages,
        "boost": zone.watermark_boost,
        "min": zone.min_wmark_pages(),
        "low": zone.low_wmark_pages(),
        "high": zone.high_wmark_pages(),
        "reserved_highatomic": zone.nr_reserved_highatomic,
        "active_anon": s["nr_zone_active_anon"],
        "inactive_anon": s["nr_zone_inactive_anon"],
        "active_file": s["nr_zone_active_file"],
        "inactive_file": s["nr_zone_inactive_file"],
        "unevictable": s["nr_zone_unevictable"],
        "writepending": s["nr_zone_write_pending"],
        "present": zone.present_pages,
        "managed": zone.managed_pages,
        "mlocked": s["nr_mlock"],
        "bounce": 0,
        "free_pcp": zone.pcp_pages(),
        "local_pcp": local,
        "free_cma": 0,
    }
    # One of them is printed with a large K, in the kernel too.
    cells = (f"{k}:{n * 4}{'KB' if k == 'reserved_highatomic' else 'kB'}" for k, n in rows.items())
    return f"Node {zone.nid} {zone.name} " + " ".join(cells)


def _free_line(zone: Zone) -> str:
    counts = zone.free_counts()
    cells = []
    for order in range(MAX_ORDER):
        types = "".join(_LETTERS[mt] for mt in range(len(_LETTERS)) if counts[mt][order])
        n = sum(row[order] for row in counts)
        cells.append(f"{n}*{4 << order}kB " + (f"({types}) " if types else ""))
    total = sum(n << o for o, n in enumerate(zone.nr_free()))
    return f"Node {zone.nid} {zone.name}: {''.join(cells)}= {total * 4}kB"
