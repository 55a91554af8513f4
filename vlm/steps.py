"""Decode one clip step by step at batch 1, on a static key/value cache.

    steps = Steps(*model.decoder, room=2400)                            # model: VideoLlava or EventGPT
    token = steps.prefill(model.prompt_embeds(pixels, query)).best[-1:] # (1,) ids, on the device
    choice = steps.verify(token).best.tolist()                          # the round's only wait for the GPU
    best = steps.verify([*choice, *draft]).best.tolist()                # len(draft) + 1 next ids
    steps.rollback(steps.length - refused)                              # discard the refused proposals

On a GPU, each pass size (number of tokens) has its own CUDA graph of llama.py's layers.
transformers' StaticCache can't serve here: it tracks its own length (no rollback), and its eager
forward waits for the host, about 20 ms a token for a 7B model on an H200.
"""

import itertools
from collections.abc import Iterable

import numpy as np
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

INPUTS = 5                           # rows of the inputs of a pass
# Tokens per tree pass for which a CUDA graph is captured
TREE_SIZES = (25, 33, 49, 65)


class Steps(Llama):
    """One sequence: prefill, verify, rollback, all called in one stream."""

    def __init__(self, language_model: nn.Module, lm_head: nn.Module, room: int, graphs: bool | None = None,
                 sizes: Iterable[int] = (*range(1, 18), *TREE_SIZES)):
        """language_model: LlamaModel; lm_head: its output layer; room: capacity in positions.

        graphs: None = on a CUDA device where the layers allow it (LLM.int8 never does). sizes:
        tokens per pass to capture graphs for; a pass of another size runs on the next larger graph.
        """
        # A multiple of 8: CUDA's attention kernels copy a mask of any other width
        slots = -(-room // 8) * 8
        super().__init__(language_model, lm_head, slots)
        self.room, self.length = room, 0
        self.cache = self.new_cache(1, slots)
        self.slots = torch.arange(slots, device=self.device)
        # Inputs of a pass, as `_inputs` cuts them up, and the same on the host: one copy for all.
        on_gpu = self.device.type == "cuda"
        self.buffer = torch.zeros(INPUTS * slots, dtype=torch.long, device=self.device)
        self.staged = torch.zeros(INPUTS * slots, dtype=torch.long, pin_memory=on_gpu)
        self.copied = torch.cuda.Event() if on_gpu else None       # the staged inputs may be overwritten
        self.attention = TreeAttention(self.heads, self.kv_heads, self.head_dim, self.device,
                                       kernel_works(self.device, self.dtype, self.head_dim))
        # Number of tokens -> (graph, the Next it writes)
        self.graphs: dict[int, tuple] = {}
        # A host copy of the last pass's `best`. rollback() reads it without waiting for the device,
        # because callers read `best` before they roll back.
        self.best_buffer = torch.zeros(slots, dtype=torch.long, pin_memory=self.device.type == "cuda")
        self.last_best = self.best_buffer[:0]
        assert self.may_be_captured or not graphs, f"this model has no CUDA graphs on {self.device}"
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

    # --------------------------------------------------------------------------------------- passes
    @torch.inference_mode()
    def embed(self, tokens: torch.Tensor | list[int]) -> torch.Tensor:
        """k ids -> (1, k, D), to append opening proposals to the prompt's embeddings."""
        return self.model.embed_tokens(self._ids(tokens).to(self.device, non_blocking=True))[None]

    @torch.inference_mode()
    def prefill(self, embeds: torch.Tensor, outputs: int = 1,
                parents: list[int] | None = None, added: torch.Tensor | None = None) -> Next:
        """embeds (1, L, D) -> the next token after each of the last `outputs` positions.

        Starts an empty sequence; its length is L afterwards. parents: the last `outputs` positions
        form a tree as in verify(); its root is the last position of the prompt. Never a graph:
        L = 2,076 is compute-bound. Causal without a mask, so that fused attention can run. added: as for
        Llama.layers.
        """
        rows, length, _ = embeds.shape
        assert rows == 1 and 1 <= outputs <= length <= self.room, (
            f"{rows} x {length}, outputs {outputs}, room {self.room}")
        # A NaN left by an earlier clip would spread into this one
        self.cache[..., length:, :].zero_()
        self.length = length
        nodes = outputs - 1 if parents else 0
        # Causal positions: the prompt, root included
        before = length - nodes
        places = self.slots[:length]
        positions = places
        mask = None
        if parents is not None and nodes:
            self._set_inputs([0] * outputs, parents, before - 1, outputs)
            _, tree_positions, _, ancestors, root = self._inputs(outputs)
            ancestors, root = ancestors[1:], root[:1]
            positions = torch.cat([places[:before], tree_positions[1:]])
            if not self.attention.fused:
                mask = visibility(root, ancestors, self.slots, self.dtype)

        def attend(number: int, queries: torch.Tensor) -> torch.Tensor:
            keys, values = self.cache[number]
            mixed = causal(queries[None, :before], keys[..., :before, :], values[..., :before, :])[0]
            if not nodes:
                return mixed
            tree = self.attention(queries[before:], keys[0], values[0], root, ancestors, mask)
            return torch.cat([mixed, tree])

        with self.on_device():
            x = self.layers(embeds[0].to(self.dtype), positions, self.cache, places, attend,
                            added=added)
            return self._record(self.following(x[-outputs:]))

    @torch.inference_mode()
    def verify(self, tokens: torch.Tensor | list[int], parents: list[int] | None = None) -> Next:
        """Append k ids, (k,) int64 on the device or a list -> the next token after each.

        The length grows by k; call keep_path() or rollback() next. parents: the tokens form a tree:
        tokens[0] continues the sequence, tokens[j] follows tokens[parents[j]], with parents[j] < j
        and k <= MAX_NODES + 1; None: a chain of any length. k == 1 is a plain decoding step.
        Nothing here waits for the device: reading `best` is the caller's only wait.
        """
        k, start = len(tokens), self.length
        assert k >= 1 and start + k <= self.room, f"length {start} + {k} exceeds room {self.room}"
        if parents is None and k > MAX_NODES + 1:
            head = self.verify(tokens[:MAX_NODES + 1])
            head = Next(head.logits.clone(), head.best.clone())     # the next pass reuses the buffers
            tail = self.verify(tokens[MAX_NODES + 1:])
            return self._record(Next(*(torch.cat(parts) for parts in zip(head, tail))))
        parents = self._chain(k) if parents is None else parents
        width = next((size for size in self.sizes if k <= size <= len(self.slots) - start), k)
        self._set_inputs(tokens, parents, start, width)
        self.length = start + k
        if width not in self.graphs:
            with self.on_device():
                return self._record(self._forward(k))
        self.graphs[width][0].replay()
        logits, best = self.graphs[width][1]
        return self._record(Next(logits[:k], best[:k]))

    @torch.inference_mode()
    def keep_path(self, path: list[int]) -> None:
        """After verify(tokens, parents): keep one path of the tree, 0 first, in consecutive slots.

        Read `best` of the pass first: like rollback(), this zeroes discarded slots if a logit was
        NaN or infinite.
        """
        start = self.length - len(self.last_best)
        assert path[0] == 0 and all(a < b for a, b in itertools.pairwise(path)), path
        first = next((at for at, node in enumerate(path) if node != at), len(path))
        if moved := path[first:]:
            slots = torch.tensor(moved, pin_memory=self.device.type == "cuda") + start
            slots = slots.to(self.device, non_blocking=True)
            kept = self.cache.index_select(-2, slots)
            self.cache[..., start + first:start + len(path), :] = kept
        self.rollback(start + len(path))

    @torch.inference_mode()
    def rollback(self, length: int) -> None:
        """Discard every position from `length` on. Read `best` of the last pass first.

        Discarded slots are masked until they are overwritten. If the last pass produced NaN or
        infinite logits, they are zeroed too: a masked slot has weight 0, but 0 * NaN is NaN.
        """
        assert 0 <= length <= self.length, f"rollback to {length} from {self.length}"
        if length < self.length and NO_NUMBER in self.last_best.tolist():
            self.cache[..., length:self.length, :].zero_()
        self.length = length

    # -------------------------------------------------------------------------------------- forward
    def _ids(self, tokens: torch.Tensor | list[int]) -> torch.Tensor:
        """(k,) int64. A list goes through pinned memory: its copy to a GPU is asynchronous."""
        if isinstance(tokens, torch.Tensor):
            return tokens
        # Allocated anew each time: the pinned allocator reuses memory only after its copy is done
        return torch.tensor(self._known(tokens), dtype=torch.long, pin_memory=self.device.type == "cuda")

    def _known(self, tokens: list[int]) -> list[int]:
        # An id out of range is a device-side assert in CUDA, which kills the process's context
        assert min(tokens) >= 0 and max(tokens) < self.vocab_size, (
            f"{tokens}: an id beyond {self.vocab_size - 1}")
        return tokens

    @staticmethod
    def _chain(k: int) -> list[int]:
        """The parents of a tree without branches."""
        return list(range(-1, k - 1))

    def _inputs(self, k: int) -> torch.Tensor:
        """(5, k) int64: for each new position its token id, its position for RoPE, its cache slot and a
        bit mask of the tree nodes it may attend to; and the slot of the root, k times."""
        return self.buffer[:INPUTS * k].view(INPUTS, k)

    def _set_inputs(self, tokens: torch.Tensor | list[int], parents: list[int], start: int,
                    width: int) -> None:
        """The inputs for a tree whose root is at slot `start`, padded to a graph of `width` tokens."""
        k, on_device = len(parents), isinstance(tokens, torch.Tensor)
        if self.copied is not None:
            self.copied.synchronize()
        staged = self.staged[:INPUTS * width]
        ids, positions, places, ancestors, root = staged.numpy().reshape(INPUTS, width)
        ids[:k] = 0 if on_device else self._known(tokens)
        positions[:k] = depths_of(parents)
        positions[:k] += start
        ancestors[:k] = ancestors_of(parents)
        # Padding repeats the first token and sees what it sees: any other token might make NaNs
        ids[k:], positions[k:], ancestors[k:] = ids[0], start, 0
        places[:] = np.arange(start, start + width)
        root[:] = start
        self.buffer[:INPUTS * width].copy_(staged, non_blocking=True)
        if self.copied is not None:
            self.copied.record(torch.cuda.current_stream(self.device))
        if on_device:
            row = self._inputs(width)[0]
            row[:k].copy_(tokens)
            row[k:] = row[0]

    def _forward(self, k: int) -> Next:
        """The pass over the inputs of k positions: what a graph captures."""
        ids, positions, places, ancestors, root = self._inputs(k)
        x, root = self.model.embed_tokens(ids), root[:1]
        # A float mask, built once: SDPA would convert a boolean mask again in every layer
        mask = None if self.attention.fused else visibility(root, ancestors, self.slots, x.dtype)

        def attend(number: int, queries: torch.Tensor) -> torch.Tensor:
            (keys,), (values,) = self.cache[number]
            return self.attention(queries, keys, values, root, ancestors, mask)

        return self.following(self.layers(x, positions, self.cache, places, attend))

    def _record(self, following: Next) -> Next:
        """Copy `best` to the host asynchronously, for rollback()."""
        self.last_best = self.best_buffer[:len(following.best)]
        self.last_best.copy_(following.best, non_blocking=True)
        return following

    # --------------------------------------------------------------------------------------- graphs
    @torch.inference_mode()
    def warm_up(self, sizes: list[int], must: bool = False) -> None:
        """Capture a graph for each pass size, largest first: smaller graphs reuse its memory.

        Each graph must reproduce the eager logits for ids it was not captured with (4-bit kernels
        come from outside PyTorch). If one does not, all are dropped with a log line, or with `must`
        that is an error.
        """
        graphs = {}
        try:
            with torch.cuda.device(self.device):
                pool = torch.cuda.graph_pool_handle()
                for k in sizes:
                    self._set_inputs([0] * k, self._chain(k), 0, k)
                    graphs[k] = capture(lambda k=k: self._forward(k), pool)
                for k, (graph, output) in graphs.items():
                    self._set_inputs([(at + 1) % self.vocab_size for at in range(k)], self._chain(k), 0, k)
                    eager = self._forward(k).logits.clone()
                    self.cache.zero_()               # the graph must not read what eager wrote
                    graph.replay()
                    if not (difference := apart(output.logits, eager)) <= SAME:
                        raise RuntimeError(f"the graph for {k} tokens differs from eager by {difference:.1%}")
            self.graphs = graphs
            log(f"steps | CUDA graphs for {', '.join(map(str, sorted(graphs)))} tokens")
        # CUDA raises RuntimeError for what can't be captured
        except RuntimeError as error:
            if must:
                raise
            log(f"steps | WARNING | no CUDA graphs, every step runs eagerly: {error}")
        self.cache.zero_()


class Prompted:
    """The Target protocol of decoding on Steps, for one prompt at a time."""

    takes_trees = True
    added: torch.Tensor | None = None            # as for Steps.prefill

    def __init__(self, steps: Steps):
        self.steps, self.vocab_size = steps, steps.vocab_size

    def ask(self, embeds: torch.Tensor) -> None:
        """Set the prompt of the next answer, embeds (1, L, D)."""
        self.embeds = embeds

    def prefill(self, proposed: list[int], parents: list[int] | None = None) -> Next:
        """The prompt and opening proposals in one pass -> the next token after each.

        parents: of a tree, as for Steps.verify; its root is the last token of the prompt.
        """
        embeds = self.embeds
        if proposed:
            embeds = torch.cat([embeds, self.steps.embed(proposed)], 1)
        return self.steps.prefill(embeds, len(proposed) + 1, parents, self.added)

    def verify(self, tokens: list[int], parents: list[int] | None = None) -> Next:
        """As Steps.verify: the answer's last token, then the proposals, a chain or a tree."""
        return self.steps.verify(tokens, parents)

    def keep_path(self, path: list[int]) -> None:
        """As Steps.keep_path: keep only these tokens of the last pass, 0 first."""
        self.steps.keep_path(path)

    def not_numbers(self) -> NotNumbers:
        """The error for an answer that needs a token where `best` is NO_NUMBER.

        NaN of later positions may have spread into a token's logits through masked slots. Before
        raising this for a pass with proposals, call keep() and verify again without them.
        """
        return NotNumbers(self.steps.dtype)

    @torch.inference_mode()
    def reference(self, tokens: list[int]) -> torch.Tensor:
        """Logits (n, V) after each of n tokens behind the prompt, by transformers' own layers."""
        whole = torch.cat([self.embeds, self.steps.embed(tokens)], 1)
        hidden = self.steps.model(inputs_embeds=whole, use_cache=False).last_hidden_state
        return self.steps.lm_head(hidden[0, -len(tokens):])

    def keep(self, tokens: int) -> None:
        """Discard all but the prompt and `tokens` tokens of the answer. Read `best` first."""
        self.steps.rollback(self.embeds.shape[1] + tokens)
