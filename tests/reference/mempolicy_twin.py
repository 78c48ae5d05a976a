"""Where pages of a policy go, page by page, in plain Python: slow, and easy to read."""

from __future__ import annotations

from collections.abc import Sequence


def remap(nodes: set[int], old: set[int], new: set[int]) -> set[int]:
    """bitmap_remap, by positions: the n-th of the old set becomes the n-th of the new one."""
    out = set()
    for nid in nodes:
        if nid not in old or not new:
            out.add(nid)
            continue
        n = len([x for x in old if x < nid])
        out.add(sorted(new)[n % len(new)])
    return out


def fold_onto(nodes: set[int], onto: set[int]) -> set[int]:
    """nodes_fold and nodes_onto: bit k stands for the k-th of the other set, going round."""
    ranks = {nid % len(onto) for nid in nodes} if onto else set()
    return {nid for rank, nid in enumerate(sorted(onto)) if rank in ranks}


class Policy:
    """A policy and where its task has got to."""

    def __init__(self, mode: str, nodes: Sequence[int], flag: str, mems: set[int]) -> None:
        self.mode, self.flag, self.mems = mode, flag, set(mems)
        self.user = set(nodes)
        self.nodes = fold_onto(self.user, mems) if flag == "relative" else self.user & mems
        if mode == "preferred" and self.nodes:
            self.nodes = {min(self.nodes)}
        self.il_prev = -1

    def rebind(self, mems: set[int]) -> None:
        """Move over to what the task may use now."""
        if self.mode == "default" or not self.nodes or (not self.flag and mems == self.mems):
            return
        if self.mode != "preferred":
            if self.flag == "static":
                nodes = self.user & mems
            elif self.flag == "relative":
                nodes = fold_onto(self.user, mems)
            else:
                nodes = remap(self.nodes, self.mems, mems)
            self.nodes = nodes or set(mems)
        self.mems = set(mems)

    def node_for(
        self, index: int, by_index: bool, here: int, fallback: dict[int, list[int]], mems: set[int]
    ) -> int:
        """The node that gives the page of an index, where all have plenty."""
        start, allowed = here, set(mems)
        if self.mode == "bind" and self.nodes & mems:
            allowed &= self.nodes
        elif self.mode == "preferred" and self.nodes:
            start = min(self.nodes)
        elif self.mode == "interleave":
            turn = sorted(self.nodes)
            if by_index:
                start = turn[index % len(turn)]
            else:
                start = min([n for n in turn if n > self.il_prev] or turn)
                self.il_prev = start
        return next(nid for nid in fallback[start] if nid in allowed)
