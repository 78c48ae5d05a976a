"""Who has to go when no memory is left (mm/oom_kill.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmm.gfp import __GFP_FS, __GFP_THISNODE
from kmm.mmflags import gfp_flag_names
from kmm.params import USER_ANON
from kmm.show_mem import comm, mems_allowed, nodemask_text, show_mem
from kmm.trace import traced

if TYPE_CHECKING:
    from kmm.machine import Machine
    from kmm.memory import User

OOM_SCORE_ADJ_MIN = -1000
_ALL_NODES = (1 << 64) - 1


@traced
def oom_badness(m: Machine, user: User, totalpages: int) -> int | None:
    """Return how much killing a task would free, and how much it asks for it; None if it must not.

    :param totalpages: of memory and swap that the request could have had.
    """
    if user.kind != USER_ANON or user.oom_score_adj == OOM_SCORE_ADJ_MIN:
        return None
    points = user.nr_present + user.engine.nr_swapped
    if points == 0:
        return None  # a task without memory is gone, or about to
    return points + user.oom_score_adj * (totalpages // 1000)


@traced
def constrained_alloc(m: Machine, gfp: int, nodes: int) -> tuple[str, int]:
    """Return which constraint a request has, and how many pages it could have had at most."""
    swap = m.swap.pages if m.swap is not None else 0
    if not gfp & __GFP_THISNODE and any(not nodes >> nid & 1 for nid in m.n_memory):
        mine = [nid for nid in sorted(m.nodes) if nodes >> nid & 1]
        present = sum(m.nodes[nid].node_present_pages for nid in mine)
        return "CONSTRAINT_MEMORY_POLICY", present + swap
    return "CONSTRAINT_NONE", m.totalram_pages + swap


@traced
def select_bad_process(m: Machine, nodes: int, totalpages: int) -> User | None:
    """Return the task whose end helps most, the later one of equals.

    :param nodes: of a constrained request; a task that is bound elsewhere would not help it.
    """
    chosen, most = None, None
    for user in m.users.values():
        bound = user.policy.nodes if user.policy.mode == "bind" else ()
        if nodes != _ALL_NODES and bound and not any(nodes >> nid & 1 for nid in bound):
            continue
        points = oom_badness(m, user, totalpages)
        if points is not None and (most is None or points >= most):
            chosen, most = user, points
    return chosen


@traced
def out_of_memory(m: Machine, gfp: int, order: int, nodes: int) -> bool:
    """Kill a task for a request that nothing else could serve.

    :param gfp, order: of the request; nodes: bit k lets node k give.
    :return: whether there is hope: one was killed, or the request must not wait for that.
    """
    if not gfp & __GFP_FS:
        return True
    constraint, totalpages = constrained_alloc(m, gfp, nodes)
    mask = nodes if constraint == "CONSTRAINT_MEMORY_POLICY" else _ALL_NODES
    victim = select_bad_process(m, mask, totalpages)
    if victim is None:
        return False
    if m.oom_ratelimit.allows(m.clock.now):
        _dump_header(m, gfp, order, mask)
        _dump_oom_summary(m, constraint, mask, victim)
    _oom_kill_process(m, victim)
    return True


def _dump_header(m: Machine, gfp: int, order: int, nodes: int) -> None:
    adj = m.current.oom_score_adj if m.current is not None else 0
    m.printk(
        f"{comm(m)} invoked oom-killer: gfp_mask={gfp:#x}({gfp_flag_names(gfp)}), "
        f"order={order}, oom_score_adj={adj}"
    )
    show_mem(m, nodes)
    m.printk("Tasks state (memory values in pages):")
    m.printk("[  pid  ]   uid  tgid total_vm      rss pgtables_bytes swapents oom_score_adj name")
    for user in m.users.values():
        if user.kind == USER_ANON and user.nr_present + user.engine.nr_swapped:
            pid = user.engine.number
            m.printk(
                f"[{pid:7}] {0:5} {pid:5} {user.pages:8} {user.nr_present:8} {0:8} "
                f"{user.engine.nr_swapped:8}         {user.oom_score_adj:5} {user.name[:15]}"
            )


def _dump_oom_summary(m: Machine, constraint: str, nodes: int, victim: User) -> None:
    m.printk(
        f"oom-kill:constraint={constraint},nodemask={nodemask_text(nodes)},{mems_allowed(m)},"
        f"global_oom,task_memcg=/,task={victim.name[:15]},pid={victim.engine.number},uid=0"
    )


def _oom_kill_process(m: Machine, victim: User) -> None:
    """End a task: its pages are free, but for those that somebody has pinned."""
    name, pid = victim.name[:15], victim.engine.number
    m.count_vm_event("oom_kill")
    m.printk(
        f"Out of memory: Killed process {pid} ({name}) total-vm:{victim.pages * 4}kB, "
        f"anon-rss:{victim.nr_present * 4}kB, file-rss:0kB, shmem-rss:0kB, UID:0 pgtables:0kB "
        f"oom_score_adj:{victim.oom_score_adj}"
    )
    victim.killed = True
    victim.release(0, victim.pages)
    if victim is m.current:
        return  # it takes its memory along itself
    m.printk(
        f"oom_reaper: reaped process {pid} ({name}), now anon-rss:{victim.nr_present * 4}kB, "
        "file-rss:0kB, shmem-rss:0kB"
    )
