"""A prefix adapter over the nodes of a tree: several nodes as one step, in slots of their own behind
the prefix.

Each node sees the draft, the prefix and its own ancestors (tree attention: Miao et al. 2024,
"SpecInfer"). A step over several nodes costs little more than a step over one, so a node that needs
the adapter brings those along that are likely to need it next.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from drafting.steps import AdapterSteps
from machine.graphs import capture

Row = tuple[list[int], list[float]]    # ids and probabilities of the next token, best first

NOTHING_TO_SAY: Row = ([], [])
LOOK_AHEAD = 6                 # further nodes that are read with one that needs the adapter
SIZES = (2, 4, 8, 16)          # nodes of a step that has a graph
TOKEN, SLOT, PLACE, VISIBLE = 0, 1, 2, 3         # columns of a step's inputs


class Branch:
    """A node of a tree, as the adapter reads it. The root stands for the prefix and holds no token."""

    __slots__ = ("above", "can_follow", "row", "slot", "token", "tokens", "visible")

    def __init__(self, token: int, above: Branch | None, tokens: int, can_follow: bool):
        """tokens: of prefix and path, this node's included; can_follow: the adapter has a position
        after it and knows all tokens."""
        self.token, self.above, self.tokens, self.can_follow = token, above, tokens, can_follow
        self.slot: int | None = None               # once its keys and values are in the cache
        self.visible: np.ndarray | None = None     # (slots,) float32: 0 where it sees, else -inf
        self.row: Row | None = None                # both empty where the adapter says nothing


class BranchSteps:
    """Reads nodes with the adapter and the cache of `steps`. One tree at a time: `open` ends the last."""

    def __init__(self, steps: AdapterSteps):
        self.steps, self.cache = steps, steps.cache
        slots, device = len(self.cache.slots), self.cache.slots.device
        on_gpu = device.type == "cuda"
        self.host = torch.zeros(SIZES[-1], VISIBLE + slots, pin_memory=on_gpu)
        self.rows = np.asarray(self.host)          # the same memory
        self.inputs = self.host.to(device, copy=True) if on_gpu else self.host
        self.outputs = torch.zeros(SIZES[-1], steps.rows.shape[1], dtype=torch.int32, device=device)
        self.ids, self.probabilities = steps.parts(self.outputs)
        self.prefix: list[int] = []
        self.free = slots                          # the next node's slot; there may be none left
        self.graphs = {}
        if on_gpu:
            self.rows[:, SLOT] = self.rows[:, PLACE] = slots - 1
            self.inputs.copy_(self.host)
            with torch.cuda.device(device):
                pool = torch.cuda.graph_pool_handle()
                for size in SIZES[::-1]:
                    self.graphs[size], _ = capture(lambda: self._forward(size), pool)  # noqa: B023
            self.cache.values[..., slots - 1, :] = 0

    def open(self, prefix: list[int]) -> Branch:
        """The root of a new tree after a verified prefix."""
        if self.steps.holds_nan:
            self.steps.forget_answer()
        self.prefix, self.free = prefix, self.steps.first + 1 + len(prefix)
        return Branch(-1, None, len(prefix), self.steps.can_follow(prefix))

    def below(self, branch: Branch, token: int) -> Branch:
        """The node of one more token."""
        tokens = branch.tokens + 1
        fits = tokens < self.steps.config.max_seq_len and self.steps.knows([token])
        return Branch(token, branch, tokens, branch.can_follow and fits)

    def path(self, branch: Branch) -> list[int]:
        """All tokens up to a node of this tree: the prefix, then the path."""
        path = []
        node: Branch | None = branch
        while node is not None and node.above is not None:
            path.append(node.token)
            node = node.above
        return [*self.prefix, *reversed(path)]

    @torch.inference_mode()
    def read(self, branches: list[Branch]) -> None:
        """Set `row` of each of these nodes, all of which the adapter can follow."""
        steps = self.steps
        if not steps.holds_nan:            # else the slots of this tree can't be trusted
            asked_root = next((branch for branch in branches if branch.above is None), None)
            if asked_root is not None and not self.prefix:
                asked_root.row = steps.after([])[0]
            unread = self._unread_prefix(asked_root is not None)
            unread += [node for branch in branches for node in self._unread(branch)]
            for at in range(0, len(unread), SIZES[-1]):
                self._step(unread[at:at + SIZES[-1]])
            if asked_root is not None:
                asked_root.row = steps.known.get(len(self.prefix), NOTHING_TO_SAY)
        for branch in branches:
            branch.row = branch.row or NOTHING_TO_SAY

    def _unread_prefix(self, with_row: bool) -> list[Branch]:
        """Tokens of the prefix that are not in the cache, as nodes in their own slots.

        with_row: the last one is read again where the row after it is not known.
        """
        steps = self.steps
        same = steps.keep_shared(self.prefix)
        steps.fed = self.prefix
        if with_row and len(self.prefix) not in steps.known:
            same = min(same, max(0, len(self.prefix) - 1))
        unread: list[Branch] = []
        for at in range(same, len(self.prefix)):
            node = Branch(self.prefix[at], None, at + 1, True)
            node.slot, node.visible = steps.first + 1 + at, self._seen_by_prefix(at + 1)
            unread.append(node)
        return unread

    def _seen_by_prefix(self, tokens: int) -> np.ndarray:
        """(slots,) float32: what the last of so many tokens of the prefix sees."""
        steps = self.steps
        visible = np.full(len(self.cache.slots), -np.inf, np.float32)
        visible[:min(steps.draft_tokens, steps.first)] = 0
        visible[steps.first:steps.first + 1 + tokens] = 0
        return visible

    def _unread(self, branch: Branch) -> list[Branch]:
        """The node and its ancestors that are not in the cache, the highest first; they get slots."""
        nodes = []
        node: Branch | None = branch
        while node is not None and node.above is not None and node.slot is None:
            nodes.append(node)
            node = node.above
        nodes.reverse()
        if self.free + len(nodes) > len(self.cache.slots):
            return []
        for node in nodes:
            above = node.above
            assert above is not None
            seen = above.visible if above.visible is not None else self._seen_by_prefix(len(self.prefix))
            node.slot, node.visible = self.free, seen.copy()
            node.visible[self.free] = 0
            self.free += 1
        return nodes

    def _step(self, nodes: list[Branch]) -> None:
        """One pass of the adapter over nodes whose ancestors are in the cache or stand before them."""
        count = len(nodes)
        size = next(size for size in SIZES if size >= count) if self.graphs else count
        for at, node in enumerate(nodes):
            self.rows[at, TOKEN], self.rows[at, SLOT] = node.token, node.slot
            self.rows[at, PLACE] = self.steps.first + node.tokens
            self.rows[at, VISIBLE:] = node.visible
        self.rows[count:size] = self.rows[0]       # filled up with a node of its own, as in `steps`
        if self.graphs:
            self.inputs[:size].copy_(self.host[:size], non_blocking=True)
            self.graphs[size].replay()
        else:
            self._forward(size)
        ids, probabilities = self.steps.parts(self.outputs[:count].cpu())
        for node, its_ids, its_probabilities in zip(nodes, ids.tolist(), probabilities.tolist()):
            finite = math.isfinite(its_probabilities[0])
            node.row = (its_ids, its_probabilities) if finite else NOTHING_TO_SAY
            if node.above is None:
                self.steps.known[node.tokens] = node.row
            self.steps.holds_nan = self.steps.holds_nan or not finite

    def _forward(self, size: int) -> None:
        inputs, adapter = self.inputs[:size], self.steps.adapter
        tokens, slots, places = inputs[:, :VISIBLE].long().unbind(1)
        mask = inputs[None, None, :, VISIBLE:].to(self.cache.masks.dtype)
        logits = adapter.step_at(tokens[None], slots, self.cache, places, mask)[0]
        probabilities, columns = F.softmax(logits, -1).topk(self.steps.top_k)
        self.ids[:size] = adapter.ids_of(columns)
        self.probabilities[:size] = probabilities
        self.steps.rows.index_copy_(0, slots, self.outputs[:size])       # where a chain looks for them
