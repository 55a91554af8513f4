"""Decoding one clip step by step: the static key/value cache through which both models decode at batch 1.

    steps = Steps(*model.decoder, room=2400)                            # model: VideoLlava or EventGPT
    token = steps.prefill(model.prompt_embeds(pixels, query)).best[-1:] # (1,) ids, on the device
    choice = steps.verify(token).best.tolist()                          # the one wait for the GPU in a round
    best = steps.verify([*choice, *draft]).best.tolist()                # what follows each: len(draft) + 1 ids
    steps.rollback(steps.length - refused)                              # forget the refused end of the draft

Our own forward over transformers' LLaMA layers, because StaticCache keeps its own length (no rollback) and eager
forwards wait for the host: about 20 ms a token for a 7B model on an H200, where this one in a CUDA graph takes
5.4 ms, and 6.1 to 6.5 ms for 2 to 17 tokens. Where q/k/v and gate/up are plain layers they are fused; the model's
modules become views of the fused matrices: nothing is stored twice and transformers' forward goes on working.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from base import log


class Next(NamedTuple):
    """What follows each of n positions. Good until the next call: a graph writes into the same memory again."""

    logits: torch.Tensor        # (n, V) in the model's dtype
    best: torch.Tensor          # (n,) int64, their argmax


class Steps:
    """One sequence: prefill, verify, rollback, all called in one stream. It holds the model's weights: drop it before
    the model is unloaded, and before another is made for the same model (each keeps its own fused matrices)."""

    def __init__(self, language_model: nn.Module, lm_head: nn.Module, room: int, graphs: bool | None = None,
                 sizes: Iterable[int] = range(1, 18)):
        """language_model: LlamaModel; lm_head: its output layer; room: the most positions there will be.

        Every step reads all of room: no more than needed. graphs: None = on a CUDA device where the layers allow it
        (LLM.int8 never does: it looks for outliers on the host); sizes: the numbers of tokens to have graphs for.
        """
        config, weight = language_model.config, language_model.embed_tokens.weight
        self.model, self.lm_head, self.device = language_model, lm_head, weight.device
        self.room, self.length = room, 0
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        slots = -(-room // 8) * 8         # CUDA's attention kernels would copy a mask that is no multiple of 8 wide
        # Zeros, not empty: a masked slot has weight 0, and 0 * NaN is NaN. Keys, then values: one kernel writes both.
        self.cache = torch.zeros(config.num_hidden_layers, 2 * self.kv_heads, slots, self.head_dim,
                                 dtype=weight.dtype, device=self.device)
        self.slots = torch.arange(slots, device=self.device)
        self.ids, self.positions = torch.zeros_like(self.slots), self.slots.clone()      # what graphs read
        # The model's own RoPE (with its scaling). (2, slots, 1, d): cos, and sin with rotate_half's sign in it.
        kind = config.rope_parameters["rope_type"]
        assert kind not in ("dynamic", "longrope"), f"{kind} RoPE changes with the length: no table for all positions"
        cos, sin = language_model.rotary_emb(self.cache, position_ids=self.slots[None])
        minus, plus = sin.chunk(2, -1)
        self.rope = torch.cat([cos, torch.cat([-minus, plus], -1)])[:, :, None]
        self.qkv, self.gate_up = [], []
        for layer in language_model.layers:          # one at a time: what is replaced is freed before the next
            self.qkv.append(fuse([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]))
            self.gate_up.append(fuse([layer.mlp.gate_proj, layer.mlp.up_proj]))
        self.graphs: dict[int, tuple] = {}           # number of tokens -> (graph, the Next it writes)
        kinds = {type(module).__name__ for module in language_model.modules()}
        possible = self.device.type == "cuda" and "Linear8bitLt" not in kinds
        assert possible or not graphs, f"no CUDA graphs on {self.device} with {sorted(kinds)}"
        if possible and graphs is not False:
            self.warm_up([k for k in sorted(set(sizes), reverse=True) if k <= room], must=graphs is True)

    @property
    def bytes(self) -> int:
        """Size of the keys and values."""
        return self.cache.nbytes

    # ------------------------------------------------------------------------------------------ verbs
    @torch.inference_mode()
    def embed(self, tokens: torch.Tensor | list[int]) -> torch.Tensor:
        """k ids -> (1, k, D): to append an opening draft to the prompt's embeddings before prefill."""
        return self.model.embed_tokens(self._ids(tokens).to(self.device, non_blocking=True))[None]

    @torch.inference_mode()
    def prefill(self, embeds: torch.Tensor, kept: int = 1) -> Next:
        """embeds (1, L, D), from length 0 -> what follows each of the last `kept` positions; length is L then.

        Compute-bound at L = 2,076, so never a graph; causal without a mask, which lets flash attention run.
        """
        rows, length, _ = embeds.shape
        assert rows == 1 and 1 <= kept <= length <= self.room, f"{rows} x {length}, kept {kept}, room {self.room}"
        self.cache[:, :, length:].zero_()            # a NaN that an earlier clip may have left would reach this one
        self.length = length
        return self._next(self._layers(embeds[0].to(self.cache))[-kept:])

    @torch.inference_mode()
    def verify(self, tokens: torch.Tensor | list[int]) -> Next:
        """Append k ids, (k,) int64 on the device or a list -> what follows each; length grows by k.

        k == 1 is the plain step. Nothing here waits for the device: reading `best` is the caller's only wait.
        """
        k, start = len(tokens), self.length
        assert k >= 1 and start + k <= self.room, f"{start} positions and {k} more, the room is {self.room}"
        self.ids[:k].copy_(self._ids(tokens), non_blocking=True)
        self.positions[:k].copy_(self.slots[start:start + k])
        self.length = start + k
        if k not in self.graphs:
            return self._forward(k)
        self.graphs[k][0].replay()
        return self.graphs[k][1]

    def rollback(self, length: int) -> None:
        """Forget every position from `length` on. What stays in their slots is masked until it is overwritten."""
        assert 0 <= length <= self.length, f"rollback to {length} from {self.length}"
        self.length = length

    # ---------------------------------------------------------------------------------------- forward
    def _ids(self, tokens: torch.Tensor | list[int]) -> torch.Tensor:
        """(k,) int64. A list goes through pinned memory, so that its copy to a GPU doesn't wait for the GPU."""
        if isinstance(tokens, torch.Tensor):
            return tokens
        size = self.model.embed_tokens.num_embeddings
        assert all(0 <= token < size for token in tokens), f"{tokens}: an id beyond {size - 1}"     # CUDA would die
        # A new one each time: PyTorch's pinned allocator gives the memory out again only after the copy is done.
        return torch.tensor(tokens, dtype=torch.long, pin_memory=self.device.type == "cuda")

    def _forward(self, k: int) -> Next:
        """The first k of the buffers `ids` and `positions`: what a graph captures."""
        return self._next(self._layers(self.model.embed_tokens(self.ids[:k]), self.positions[:k]))

    def _next(self, x: torch.Tensor) -> Next:        # (n, D)
        logits = self.lm_head(normed(x, self.model.norm))
        return Next(logits, logits.argmax(-1))

    def _layers(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """x (n, D) at positions (n,), or at 0..n-1 when None -> (n, D) before the last norm.

        Few kernels on purpose, 15 a layer: each costs 2-3 us in a graph, and there are 32 layers.
        """
        n, heads, kv_heads = len(x), self.heads, self.kv_heads
        if positions is None:
            (cos, sin), mask = self.rope[:, :n], None
        else:
            cos, sin = self.rope[:, positions]
            # As numbers, made once: of a boolean mask SDPA would make the same numbers again in every layer.
            mask = x.new_zeros(n, len(self.slots)).masked_fill_(self.slots > positions[:, None], -torch.inf)
        for layer, cache, qkv_weight, gate_up_weight in zip(self.model.layers, self.cache, self.qkv, self.gate_up):
            attention, mlp = layer.self_attn, layer.mlp
            qkv = together(normed(x, layer.input_layernorm), qkv_weight,
                           attention.q_proj, attention.k_proj, attention.v_proj).unflatten(-1, (-1, self.head_dim))
            turned = qkv[:, :heads + kv_heads]                                  # RoPE in place, q and k at once
            swapped = turned.roll(self.head_dim // 2, -1)                       # (x2, x1); the sign is in sin
            turned.mul_(cos).addcmul_(swapped, sin)
            qkv = qkv.transpose(0, 1)                                           # (heads, n, d)
            query, kv = qkv[:heads], qkv[heads:]
            if positions is None:
                cache[:, :n] = kv
            else:
                kv = cache.index_copy_(1, positions, kv)
            mixed = attend(query, kv[:kv_heads], kv[kv_heads:], mask)
            x = x + attention.o_proj(mixed.transpose(0, 1).reshape(n, -1))
            gate, up = together(normed(x, layer.post_attention_layernorm), gate_up_weight,
                                mlp.gate_proj, mlp.up_proj).chunk(2, -1)
            x = x + mlp.down_proj(mlp.act_fn(gate) * up)
        return x

    # ----------------------------------------------------------------------------------------- graphs
    @torch.inference_mode()
    def warm_up(self, sizes: list[int], must: bool = False) -> None:
        """Capture a graph for each number of tokens, largest first: the smaller ones fit into its memory.

        A graph is believed only after it gave what eager gives for ids it was not captured with (4-bit kernels come
        from outside PyTorch). If one does not, all are dropped and a line says so, or with `must` it is an error.
        """
        graphs = {}
        try:
            with torch.cuda.device(self.device):
                stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
                for k in sizes:
                    graphs[k] = self._capture(k, stream, pool)
                self.ids.copy_((self.slots + 1) % self.model.embed_tokens.num_embeddings)
                for k, (graph, output) in graphs.items():
                    eager = self._forward(k).logits.float()
                    self.cache.zero_()               # what eager wrote must not help the graph
                    graph.replay()
                    apart = float((output.logits.float() - eager).abs().max() / eager.abs().max())
                    if not apart <= 0.02:            # bfloat16 rounds by up to 0.4 % each time; refuses NaN too
                        raise RuntimeError(f"the one for {k} tokens differs from eager by {apart:.1%}")
            self.graphs = graphs
            log(f"steps | CUDA graphs for {', '.join(map(str, sorted(graphs)))} tokens")
        except RuntimeError as error:                # CUDA's refusals while capturing are RuntimeErrors
            if must:
                raise
            log(f"steps | WARNING | no CUDA graphs, every step runs eagerly: {error}")
        self.ids.zero_()
        self.cache.zero_()

    def _capture(self, k: int, stream, pool) -> tuple:
        """A graph of _forward(k), and the Next it writes. A stream of our own: PyTorch's belongs to one device."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):              # lazy set-up (cuBLAS, attention plans) can't be captured
            for _ in range(3):
                self._forward(k)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads that prepare the next clip may allocate pinned memory meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            output = self._forward(k)
        return graph, output


class Prompted:
    """One prompt at a time on Steps, with the verbs that decoding.decode wants of a target."""

    def __init__(self, steps: Steps):
        self.steps, self.vocab_size = steps, steps.model.embed_tokens.num_embeddings

    def ask(self, embeds: torch.Tensor) -> None:
        """embeds (1, L, D): the prompt of the answer to come."""
        self.embeds = embeds

    def prefill(self, proposed: list[int]) -> Next:
        """The prompt and an opening draft in one pass -> what follows the prompt and each proposal."""
        embeds = torch.cat([self.embeds, self.steps.embed(proposed)], 1) if proposed else self.embeds
        return self.steps.prefill(embeds, len(proposed) + 1)

    def verify(self, tokens: list[int]) -> Next:
        return self.steps.verify(tokens)

    def keep(self, tokens: int) -> None:
        """Forget all but the prompt and so many tokens of the answer."""
        self.steps.rollback(self.embeds.shape[1] + tokens)


# ---------------------------------------------------------------------------------------------- parts
def normed(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """LLaMA's RMS norm in one kernel; transformers' rounds once more in between (visible in 16 bits only)."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """query (heads, n, d), keys, values (kv_heads, slots, d), mask (n, slots) to add or None: causal -> like query.

    A few positions are written out: SDPA gives each head one thread block, and a GPU has four times as many to give
    (7B on an H200, 9 positions: 50 us a layer). Scores are float32 between the products, as inside SDPA.
    """
    heads, n, d = query.shape
    if mask is None or not 1 < n <= 32:
        return F.scaled_dot_product_attention(query[None], keys[None], values[None], mask, is_causal=mask is None,
                                              enable_gqa=len(keys) != heads)[0]
    query = query.reshape(len(keys), -1, d)                                   # heads that share keys side by side
    wide = {"out_dtype": torch.float32} if query.is_cuda and query.dtype != torch.float32 else {}
    scores = torch.bmm(query, keys.mT, **wide).view(heads, n, -1)
    chances = torch.add(mask, scores, alpha=d ** -0.5).softmax(-1).to(query)
    return torch.bmm(chances.view(len(keys), -1, keys.shape[1]), values).view(heads, n, d)


def together(x: torch.Tensor, weight: torch.Tensor | None, *modules: nn.Module) -> torch.Tensor:
    """The outputs of linear layers side by side: one product where they are fused, else the modules as they are."""
    return F.linear(x, weight) if weight is not None else torch.cat([module(x) for module in modules], -1)


@torch.no_grad()         # not inference_mode: the modules must not be left with inference tensors
def fuse(modules: list[nn.Module]) -> torch.Tensor | None:
    """One matrix of the weights of plain linear layers without bias, which become views of it; else None."""
    if any(type(module) is not nn.Linear or module.bias is not None for module in modules):
        return None                                  # bitsandbytes' layers are subclasses of nn.Linear
    fused = torch.cat([module.weight for module in modules])
    for module, part in zip(modules, fused.split([module.out_features for module in modules])):
        module.weight.data = part
    return fused
