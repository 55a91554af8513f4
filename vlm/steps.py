"""Decoding one clip step by step: the static key/value cache through which both models decode at batch 1.

    steps = Steps(*model.decoder, room=2400)                            # model: VideoLlava or EventGPT
    token = steps.prefill(model.prompt_embeds(pixels, query)).best[-1:] # (1,) ids, on the device
    choice = steps.verify(token).best.tolist()                          # the one wait for the GPU in a round
    best = steps.verify([*choice, *draft]).best.tolist()                # what follows each: len(draft) + 1 ids
    steps.rollback(steps.length - refused)                              # forget the refused end of the draft

On a GPU every number of tokens has a CUDA graph of llama.py's layers, because StaticCache of
transformers keeps its own length (no rollback) and its eager forward waits for the host: about 20
ms a token for a 7B model on an H200.
"""

import itertools
from collections.abc import Iterable

import torch
from torch import nn

from base import log
from machine.graphs import capture
from vlm.attention import causal
from vlm.contract import NotNumbers
from vlm.llama import NO_NUMBER, SAME, Llama, Next, apart
from vlm.tree_attention import (
    MAX_NODES,
    TreeAttention,
    ancestors_of,
    depths_of,
    kernel_works,
    visibility,
)

# Numbers of tokens of a pass over a tree that have a CUDA graph
TREE_SIZES = (25, 33, 49, 65)


class Steps(Llama):
    """One sequence: prefill, verify, rollback, all called in one stream."""

    def __init__(self, language_model: nn.Module, lm_head: nn.Module, room: int, graphs: bool | None = None,
                 sizes: Iterable[int] = (*range(1, 18), *TREE_SIZES)):
        """language_model: LlamaModel; lm_head: its output layer; room: the most positions there will be.

        graphs: None = on a CUDA device where the layers allow it (LLM.int8 never does); sizes: the
        numbers of tokens to have graphs for. A pass over another number of tokens runs on the next
        larger graph.
        """
        # CUDA's attention kernels would copy a mask that is no multiple of 8 wide
        slots = -(-room // 8) * 8
        super().__init__(language_model, lm_head, slots)
        self.room, self.length = room, 0
        self.cache = self.new_cache(1, slots)
        self.slots = torch.arange(slots, device=self.device)
        # What graphs read, for each new position: its id; its place in the answer, its slot, the
        # nodes that it may see; and the slot of the first. To begin with a chain from slot 0.
        self.ids = torch.zeros_like(self.slots)
        self.plan = torch.zeros(4, slots, dtype=torch.long, device=self.device)
        self.positions, self.places, self.ancestors, (self.root,
                                                      _) = *self.plan[:3], self.plan[3].split([
                                                          1, slots - 1
                                                      ])
        self.positions.copy_(self.slots)
        self.places.copy_(self.slots)
        chain = ancestors_of(list(range(-1, min(MAX_NODES + 1, slots) - 1)))
        self.ancestors[:len(chain)].copy_(torch.tensor(chain))
        self.attention = TreeAttention(self.heads, self.kv_heads, self.head_dim, self.device,
                                       kernel_works(self.device, self.dtype, self.head_dim))
        # Number of tokens -> (graph, the Next it writes)
        self.graphs: dict[int, tuple] = {}
        # `best` of the last pass, where rollback() reads it without waiting: whoever rolls back has
        # read it before.
        self.last_best = torch.zeros(slots, dtype=torch.long, pin_memory=self.device.type == "cuda")
        self.noted = self.last_best[:0]
        assert self.may_be_captured or not graphs, f"no CUDA graphs of this model on {self.device}"
        if self.may_be_captured and graphs is not False:
            self.warm_up([k for k in sorted(set(sizes), reverse=True) if k <= room], must=graphs is True)

    @property
    def sizes(self) -> list[int]:
        """The numbers of tokens that have a graph, ascending."""
        return sorted(self.graphs)

    @property
    def bytes(self) -> int:
        """Size of the keys and values."""
        return self.cache.nbytes

    # ---------------------------------------------------------------------------------------- verbs
    @torch.inference_mode()
    def embed(self, tokens: torch.Tensor | list[int]) -> torch.Tensor:
        """k ids -> (1, k, D): to append an opening draft to the prompt's embeddings before prefill."""
        return self.model.embed_tokens(self._ids(tokens).to(self.device, non_blocking=True))[None]

    @torch.inference_mode()
    def prefill(self, embeds: torch.Tensor, kept: int = 1,
                parents: list[int] | None = None) -> Next:
        """embeds (1, L, D), from length 0 -> what follows each of the last `kept` positions; length
        is L then.

        parents: the last `kept` positions form a tree as in verify(), whose root is the last of the
        prompt. Compute-bound at L = 2,076, so never a graph; causal without a mask, which lets
        fused attention run.
        """
        rows, length, _ = embeds.shape
        assert rows == 1 and 1 <= kept <= length <= self.room, f"{rows} x {length}, kept {kept}, room {self.room}"
        # A NaN that an earlier clip may have left would reach this one
        self.cache[..., length:, :].zero_()
        self.length = length
        nodes = kept - 1 if parents else 0
        # Positions that are attended causally, the root among them
        before = length - nodes
        places = self.slots[:length]
        positions = places
        if nodes:
            self._set_plan(parents, before - 1, len(parents))
            positions = torch.cat([places[:before], self.positions[1:kept]])
            mask = None if self.attention.fused else visibility(self.root, self.ancestors[1:kept],
                                                                self.slots, self.dtype)

        def attend(number: int, queries: torch.Tensor) -> torch.Tensor:
            keys, values = self.cache[number]
            mixed = causal(queries[None, :before], keys[..., :before, :], values[..., :before, :])[0]
            if not nodes:
                return mixed
            tree = self.attention(queries[before:], keys[0], values[0], self.root,
                                  self.ancestors[1:kept], mask)
            return torch.cat([mixed, tree])

        with self.on_device():
            x = self.layers(embeds[0].to(self.dtype), positions, self.cache, places, attend)
            return self._noted(self.following(x[-kept:]))

    @torch.inference_mode()
    def verify(self, tokens: torch.Tensor | list[int], parents: list[int] | None = None) -> Next:
        """Append k ids, (k,) int64 on the device or a list -> what follows each; length grows by k.

        parents: the tokens form a tree: tokens[0] follows what came before, tokens[j] follows
        tokens[parents[j]], with parents[j] < j and k <= MAX_NODES + 1; None: a chain of any length.
        Call keep_path() or rollback() next. k == 1 is the plain step. Nothing here waits for the
        device: reading `best` is the caller's only wait.
        """
        k, start = len(tokens), self.length
        assert k >= 1 and start + k <= self.room, f"{start} positions and {k} more, the room is {self.room}"
        if parents is None and k > MAX_NODES + 1:
            first = self.verify(tokens[:MAX_NODES + 1])
            first = Next(first.logits.clone(), first.best.clone())
            rest = self.verify(tokens[MAX_NODES + 1:])
            return self._noted(Next(*(torch.cat(parts) for parts in zip(first, rest))))
        parents = list(range(-1, k - 1)) if parents is None else parents
        width = next((size for size in self.sizes if k <= size <= len(self.slots) - start), k)
        self.ids[:k].copy_(self._ids(tokens), non_blocking=True)
        self._set_plan(parents, start, width)
        self.length = start + k
        if width not in self.graphs:
            with self.on_device():
                return self._noted(self._forward(k))
        self.graphs[width][0].replay()
        logits, best = self.graphs[width][1]
        return self._noted(Next(logits[:k], best[:k]))

    @torch.inference_mode()
    def keep_path(self, path: list[int]) -> None:
        """After verify(tokens, parents): keep only this path of the tree, 0 first, in consecutive slots.

        Read `best` of the pass first: as in rollback(), what is forgotten is zeroed where logits
        were no numbers.
        """
        start = self.length - len(self.noted)
        assert path[0] == 0 and all(a < b for a, b in itertools.pairwise(path)), path
        if path != list(range(len(path))):
            moved = self.cache[..., [start + node for node in path], :]
            self.cache[..., start:start + len(path), :] = moved
        self.rollback(start + len(path))

    @torch.inference_mode()
    def rollback(self, length: int) -> None:
        """Forget every position from `length` on. Read `best` of the last pass first.

        The contents of their slots are masked until they are overwritten. Where the last pass gave
        logits that are no numbers they are zeroed: a masked slot has weight 0, but 0 * NaN is NaN.
        """
        assert 0 <= length <= self.length, f"rollback to {length} from {self.length}"
        if length < self.length and NO_NUMBER in self.noted.tolist():
            self.cache[..., length:self.length, :].zero_()
        self.length = length

    # -------------------------------------------------------------------------------------- forward
    def _ids(self, tokens: torch.Tensor | list[int]) -> torch.Tensor:
        """(k,) int64. A list goes through pinned memory, so that its copy to a GPU doesn't wait for
        the GPU.
        """
        if isinstance(tokens, torch.Tensor):
            return tokens
        size = self.vocab_size
        # CUDA would die
        assert all(0 <= token < size for token in tokens), f"{tokens}: an id beyond {size - 1}"
        # A new one each time: PyTorch's pinned allocator gives the memory out again only after the
        # copy is done.
        return torch.tensor(tokens, dtype=torch.long, pin_memory=self.device.type == "cuda")

    def _set_plan(self, parents: list[int], start: int, width: int) -> None:
        """Positions, places and ancestors of a tree whose root is at slot `start`, and the root."""
        # Positions that only fill a graph's width: they see what came before, no more
        filler = width - len(parents)
        plan = [[start + depth for depth in depths_of(parents)] + [start] * filler,
                list(range(start, start + width)),
                ancestors_of(parents) + [0] * filler, [start] * width]
        self.plan[:, :width].copy_(torch.tensor(plan, pin_memory=self.device.type == "cuda"),
                                   non_blocking=True)

    def _forward(self, k: int) -> Next:
        """The first k of the buffers: what a graph captures."""
        x, ancestors = self.model.embed_tokens(self.ids[:k]), self.ancestors[:k]
        # As numbers, made once: of a boolean mask SDPA would make the same numbers again in every layer.
        mask = None if self.attention.fused else visibility(self.root, ancestors, self.slots, x.dtype)

        def attend(number: int, queries: torch.Tensor) -> torch.Tensor:
            (keys,), (values,) = self.cache[number]
            return self.attention(queries, keys, values, self.root, ancestors, mask)

        return self.following(self.layers(x, self.positions[:k], self.cache, self.places[:k], attend))

    def _noted(self, following: Next) -> Next:
        """Copy `best` to the host without waiting, for rollback()."""
        self.noted = self.last_best[:len(following.best)]
        self.noted.copy_(following.best, non_blocking=True)
        return following

    # --------------------------------------------------------------------------------------- graphs
    @torch.inference_mode()
    def warm_up(self, sizes: list[int], must: bool = False) -> None:
        """Capture a graph for each number of tokens, largest first: the smaller ones fit into its memory.

        A graph is believed only after it gave what eager gives for ids it was not captured with
        (4-bit kernels come from outside PyTorch). If one does not, all are dropped and a line says
        so, or with `must` it is an error.
        """
        graphs = {}
        try:
            with torch.cuda.device(self.device):
                pool = torch.cuda.graph_pool_handle()
                for k in sizes:
                    graphs[k] = capture(lambda k=k: self._forward(k), pool)
                self.ids.copy_((self.slots + 1) % self.vocab_size)
                for k, (graph, output) in graphs.items():
                    eager = self._forward(k).logits.clone()
                    self.cache.zero_()               # what eager wrote must not help the graph
                    graph.replay()
                    if not (difference := apart(output.logits, eager)) <= SAME:
                        raise RuntimeError(f"the one for {k} tokens differs from eager by {difference:.1%}")
            self.graphs = graphs
            log(f"steps | CUDA graphs for {', '.join(map(str, sorted(graphs)))} tokens")
        # CUDA's refusals while capturing are RuntimeErrors
        except RuntimeError as error:
            if must:
                raise
            log(f"steps | WARNING | no CUDA graphs, every step runs eagerly: {error}")
        self.ids.zero_()
        self.cache.zero_()


class Prompted:
    """One prompt at a time on Steps, with the verbs that decoding.decode wants of a target."""

    def __init__(self, steps: Steps):
        self.steps, self.vocab_size = steps, steps.vocab_size

    def ask(self, embeds: torch.Tensor) -> None:
        """embeds (1, L, D): the prompt of the answer to come."""
        self.embeds = embeds

    def prefill(self, proposed: list[int], parents: list[int] | None = None) -> Next:
        """The prompt and opening proposals in one pass -> what follows the prompt and each proposal.

        parents: of a tree, as Steps.verify takes them; its root is the last token of the prompt.
        """
        embeds = torch.cat([self.embeds, self.steps.embed(proposed)],
                           1) if proposed else self.embeds
        return self.steps.prefill(embeds, len(proposed) + 1, parents)

    def verify(self, tokens: list[int], parents: list[int] | None = None) -> Next:
        """As Steps.verify: the answer's last token, then what is proposed, a chain or a tree."""
        return self.steps.verify(tokens, parents)

    def keep_path(self, path: list[int]) -> None:
        """As Steps.keep_path: of the last pass only these tokens stay, 0 first."""
        self.steps.keep_path(path)

    def not_numbers(self) -> NotNumbers:
        """The error for an answer that needs a token where `best` is NO_NUMBER.

        Positions behind a token may have spoilt its logits, because masked NaN reach them: before
        this is raised for a pass with proposals, keep() and ask again without them.
        """
        return NotNumbers(self.steps.dtype)

    def keep(self, tokens: int) -> None:
        """Forget all but the prompt and so many tokens of the answer. Read `best` of the last pass first."""
        self.steps.rollback(self.embeds.shape[1] + tokens)
