"""Where a block ends on the dominator chain: by the block behind it, and for the last block by the shape of the blocks before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.accessors import describe
from graph_passes.find.branches import adds_other_than_attention
from graph_passes.find.dominators import Dominators
from runtimes.errors import SiteAmbiguous, SiteNotFound

_SAME_TENSOR = frozenset({"Cast", "Identity", "Reshape"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One value of the dominator chain: its node, the output that carries it, and the label by which blocks are compared."""

    node: ir.Node | None
    """None for the chain's first, a graph input."""
    output_index: int | None
    label: str

    @property
    def computed_by(self) -> ir.Node:
        """The node; SiteNotFound for the chain's first."""
        if self.node is None:
            raise SiteNotFound("the graph's own input is not the output of a block")
        return self.node


def check_inner_end(dominators: Dominators, chain: Sequence[Step], starts: Sequence[int], layer: int) -> None:
    """Raises SiteAmbiguous where what block ``layer`` + 1 reads may not be what block ``layer`` wrote.

    Constants added or multiplied behind a block's last residual Add are its own only if they stand behind the last block too.
    """
    end = starts[layer + 1]
    add = end
    while add > starts[layer] and _is_constant_step(dominators, chain[add]):
        add -= 1
    labels = [step.label for step in chain]
    own = labels[add : end + 1]
    if add == end or labels[add] != "merge":
        return
    tail = range(starts[-1] + 1, len(chain))
    if not any(labels[position : position + len(own)] == own for position in tail):
        raise SiteAmbiguous(
            f"the output of block {layer} is either {_named(chain, [add])} or {_named(chain, [end])}: what stands between them does not "
            "stand behind the last block, and whether it belongs to the block cannot be told; leave this site out"
        )


def last_block_end(dominators: Dominators, chain: Sequence[Step], starts: Sequence[int], keys: Sequence[ir.Value]) -> tuple[int, str]:
    """Chain index of the last block's output, and how it was told; raises SiteNotFound or SiteAmbiguous."""
    labels = [step.label for step in chain]
    blocks = {tuple(labels[start + 1 : stop + 1]) for start, stop in zip(starts, starts[1:], strict=False)}
    tail = tuple(labels[starts[-1] + 1 :])
    ends = sorted({starts[-1] + len(block) for block in blocks if tail[: len(block)] == block})
    where = f"output of the last block (layer {len(starts) - 1})"
    merges = [position for position in range(starts[-1] + 1, len(chain)) if labels[position] == "merge"]
    if len(ends) == 1:
        end = ends[0]
        if more := [position for position in merges if position > end and _adds_to(dominators, chain[position], chain[end])]:
            raise SiteAmbiguous(
                f"the {where} is either {_named(chain, [end])}, where it repeats the blocks before it, or {_named(chain, more)}, "
                "which adds another branch to that; whether that branch is the block's or a head's cannot be told; export without the "
                "head, or leave this site out"
            )
        return end, "the last block then repeats the blocks before it"
    candidates = _named(chain, ends or merges) or "none"
    if ends:
        raise SiteAmbiguous(f"the {where} has several candidates, as the blocks differ from each other: {candidates}")
    if blocks or not merges:
        raise SiteNotFound(
            f"the {where} does not look like that of any block before it; residual Adds behind its input: {candidates}; "
            "an export without fused norms may show it"
        )
    return _only_block_end(dominators, chain, starts[-1], merges, keys[-1], where), "it is the last residual Add of the only block"


def _only_block_end(dominators: Dominators, chain: Sequence[Step], start: int, merges: Sequence[int], key: ir.Value, where: str) -> int:
    """The last of ``merges``, or the Reshape behind it; there is no other block to compare with."""
    end = merges[-1]
    # A norm between two Adds makes it a post-norm block, whose output is a norm and not an Add, and nothing tells that norm from a
    # model's own last one.
    if any(step.label not in ("merge", "Reshape") for step in chain[start + 1 : end]):
        raise SiteAmbiguous(
            f"the {where} is either {_named(chain, [end])} or the norm behind it: in a single block a post-norm cannot be "
            "told from a final norm; use a base of two layers or more"
        )
    nodes = frozenset(step.node for step in chain if step.node is not None)
    others = [position for position in merges if adds_other_than_attention(dominators, chain[position].computed_by, key, nodes)]
    if [step.label for step in chain[end + 1 : end + 2]] == ["Reshape"]:
        end += 1
    if len(others) > 1 or (end + 1 < len(chain) and _is_constant_step(dominators, chain[end + 1])):
        candidates = others if len(others) > 1 else [end, end + 1]
        raise SiteAmbiguous(
            f"the {where} has several candidates: {_named(chain, candidates)}; in a single block what belongs to it cannot be told from "
            "what a head adds; use a base of two layers or more"
        )
    return end


def _is_constant_step(dominators: Dominators, step: Step) -> bool:
    return step.node is not None and dominators.shifts_or_scales(step.node)


def _adds_to(dominators: Dominators, merge: Step, end: Step) -> bool:
    """Whether ``merge`` adds a branch to what ``end`` carries, times a factor at most: a residual Add, not one inside a norm or a head."""
    for value in merge.computed_by.inputs[:2]:
        while value is not None and (node := value.producer()) is not None:
            if node is end.node:
                if value.index() == end.output_index:
                    return True
                break
            if node.op_type not in _SAME_TENSOR and not dominators.shifts_or_scales(node):
                break
            value = next((source for source in node.inputs if dominators.depends(source)), None)
    return False


def _named(chain: Sequence[Step], positions: Sequence[int]) -> str:
    return ", ".join(describe(chain[position].computed_by) for position in positions)
