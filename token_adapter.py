"""The TokenAdapter: a small transformer that proposes the target's next tokens; save and load.

Three ways to condition it, through the same blocks:

    draft          output i sees draft[:i+1]: the original suite's architecture, exactly (post-norm)
    prefix         output i sees target[:i], the tokens verified so far
    prefix+draft   the same, and the whole draft before them

The blocks are our own, because nn.TransformerEncoder can't keep keys and values from one step to the next. They
carry its parameter names, so that checkpoints of the original suite load. Vaswani et al. 2017, "Attention Is All
You Need", with GELU; pre-norm (Xiong et al. 2020) and tied embeddings (Press and Wolf 2017) in prefix conditioning.
"""

import dataclasses
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from base import UserError, first_line
from machine.files import check_plain, write_whole

# What output i of the adapter proposes. It is written into every checkpoint: trained one way and read the
# other, nothing at all is accepted, which is what happened in the original suite.
CONTRACTS = {"draft": "target[i] from draft[:i+1]", "prefix": "target[i] from target[:i]",
             "prefix+draft": "target[i] from target[:i] and the whole draft"}
ORIGINAL_CONTRACT = "target[i+1] from draft[:i+1]"
ORIGINAL_NUM_HEADS = 8
NOT_SCORED = -100              # a label that cross_entropy leaves out by default, and equal to no column


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    vocab_size: int
    conditioning: str = "prefix+draft"
    embed_dim: int = 512
    num_layers: int = 4
    num_heads: int = 8
    feedforward_dim: int = 2048
    max_seq_len: int = 128
    dropout: float = 0.1
    contract: str = ""               # "": the one that belongs to the conditioning
    draft_vocab: int = 0             # ids that are scored; 0: all of the vocabulary

    def __post_init__(self):
        if self.conditioning not in CONTRACTS:
            raise UserError(f"unknown conditioning {self.conditioning!r}, wanted one of {list(CONTRACTS)}")
        if not self.contract:
            object.__setattr__(self, "contract", CONTRACTS[self.conditioning])
        original = self.conditioning == "draft" and self.contract == ORIGINAL_CONTRACT
        if self.contract != CONTRACTS[self.conditioning] and not original:
            raise UserError(f"unknown contract {self.contract!r} for conditioning {self.conditioning}, wanted "
                            f"{CONTRACTS[self.conditioning]!r}")
        for name in ("vocab_size", "embed_dim", "num_layers", "num_heads", "feedforward_dim", "max_seq_len"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"{name} must be a whole number of 1 or more, got {value!r}")
        if type(self.draft_vocab) is not int or not 0 <= self.draft_vocab <= self.vocab_size:
            raise UserError(f"draft_vocab must be from 0 to the vocabulary size {self.vocab_size}, got "
                            f"{self.draft_vocab!r}")
        if self.embed_dim % self.num_heads:
            raise UserError(f"num_heads must divide embed_dim, got {self.num_heads} and {self.embed_dim}")
        if not isinstance(self.dropout, float) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), got {self.dropout!r}")

    @property
    def first_position(self) -> int:
        """The target position that output 0 proposes; those before it are never proposed."""
        return 1 if self.contract == ORIGINAL_CONTRACT else 0

    @property
    def outputs(self) -> int:
        """Ids that are scored."""
        return self.draft_vocab or self.vocab_size

    @property
    def sees_prefix(self) -> bool:
        return self.conditioning != "draft"


class Cache:
    """Keys and values of one batch: the draft, then begin-of-answer and the answer; `length` moves back to forget.

    Slots are numbered by tensors and masks always span all of them, so that a CUDA graph can replay a step; what a
    slot sees and its position stand in tables, of which a step takes a row.
    """

    SPARE = 16                     # slots that a graph of more tokens than are left may write to; never seen

    def __init__(self, config: AdapterConfig, batch: int, like: torch.Tensor):
        """like: a weight of the adapter, whose device and number format it has."""
        heads, room = config.num_heads, 2 * config.max_seq_len + self.SPARE
        self.values = like.new_zeros(config.num_layers, 2, batch, heads, room, config.embed_dim // heads)
        self.slots = torch.arange(room, device=like.device)
        self.masks = like.new_zeros(batch, 1, room, room)                # of each slot: 0 where it sees, else -inf
        self.positions = like.new_zeros(room, config.embed_dim)          # of each slot: its place's embedding
        self.length = 0


def added(mask):
    """mask (B, T, S) bool, True where seen -> (B, 1, T, S) float32, to be added to scores."""
    return torch.where(mask, 0.0, -torch.inf)[:, None]


class SelfAttention(nn.Module):
    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.embed_dim, config.embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * config.embed_dim))
        self.out_proj = nn.Linear(config.embed_dim, config.embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, mask=None, kept=None, slots=None, sizes=None):
        """x (B, T, D) -> (B, T, D). mask (B, 1, T, S) bool, True where seen; None: causal.

        sizes: the T positions are texts of so many tokens that don't see each other, causal but for the first, which
        the mask is for; None: one text. kept (2, B, heads, S, D / heads) keeps keys and values from one call to the
        next: these T positions are written at slots (T,) int64, and all S are attended to; the mask is then added, 0
        where seen, else -inf.
        """
        B, T, D = x.shape
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, T, 3, self.num_heads, -1)
        projected = projected.permute(2, 0, 3, 1, 4)                           # 3 x (B, heads, T, D / heads)
        if kept is None:
            dropout, texts = self.dropout if self.training else 0.0, projected.split(sizes or T, 3)
            masks = [mask, *[None] * (len(texts) - 1)]
            mixed = [F.scaled_dot_product_attention(*text, seen, dropout, is_causal=seen is None)
                     for text, seen in zip(texts, masks)]
            mixed = torch.cat(mixed, 2) if len(texts) > 1 else mixed[0]
        else:
            # Written out: for one position in float32 the fused kernel of an H200 took 39 us, 40 % of a whole step.
            key, value = kept.index_copy_(3, slots, projected[1:])
            scores = torch.add(mask, projected[0] @ key.mT, alpha=(D // self.num_heads) ** -0.5)
            mixed = scores.softmax(-1) @ value
        return self.out_proj(mixed.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.norm_first = config.sees_prefix
        self.self_attn = SelfAttention(config)
        self.linear1 = nn.Linear(config.embed_dim, config.feedforward_dim)
        self.linear2 = nn.Linear(config.feedforward_dim, config.embed_dim)
        self.norm1 = nn.LayerNorm(config.embed_dim)
        self.norm2 = nn.LayerNorm(config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, *attend):                                     # x (B, T, D) -> (B, T, D)
        if self.norm_first:
            x = x + self.dropout(self.self_attn(self.norm1(x), *attend))
            return x + self.dropout(self.feed_forward(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.self_attn(x, *attend)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))

    def feed_forward(self, x):
        return self.linear2(self.dropout(F.gelu(self.linear1(x))))


class TokenAdapter(nn.Module):
    """Sub-modules are named as in the original suite; `transformer.layers` as in nn.TransformerEncoder.

    output_ids (K,) int64, ascending: the ids that are scored, when not all are (a frequency-ranked output as in
    Zhao et al. 2025, "FR-Spec"). Logits then have K columns: ids_of() and labels_of() translate.
    """

    def __init__(self, config: AdapterConfig, output_ids: torch.Tensor | None = None):
        super().__init__()
        self.config = config
        if output_ids is None and config.draft_vocab:
            output_ids = torch.empty(config.draft_vocab, dtype=torch.long)      # a checkpoint fills it
        self.register_buffer("output_ids", output_ids)
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.position_embedding = nn.Embedding(config.max_seq_len, config.embed_dim)
        blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.transformer = nn.ModuleDict({"layers": blocks})
        self.output_proj = nn.Sequential(nn.LayerNorm(config.embed_dim),
                                         nn.Linear(config.embed_dim, config.vocab_size))
        if config.sees_prefix:
            self.begin = nn.Parameter(torch.empty(config.embed_dim))           # begin-of-answer
            self.as_draft = nn.Parameter(torch.empty(config.embed_dim))        # added to tokens of the draft
            self.embedding_dropout = nn.Dropout(config.dropout)
            for weight in (self.begin, self.as_draft, self.embedding.weight, self.position_embedding.weight):
                nn.init.normal_(weight, std=0.02)
            self.output_proj[1].weight = self.embedding.weight

    def forward(self, draft, draft_lengths=None, prefix=None):
        """One full pass -> logits; output i proposes target[:, i + config.first_position].

        draft (B, Td) int64 ids; draft conditioning: (B, T) -> (B, T, vocab_size), output i sees draft[:, :i + 1].
        Prefix conditionings: prefix (B, T) int64, verified target tokens -> (B, T + 1, vocab_size), output i sees
        prefix[:, :i] and, in prefix+draft, the first draft_lengths (B,) tokens of the draft. A length of 0 is a
        missing draft.
        """
        return self._logits(self.hidden(draft, draft_lengths, prefix))

    def hidden(self, draft, draft_lengths=None, prefix=None, text=None):
        """x (B, T, D) that the logits of `forward` are made from, by `output`.

        Only for training, text (B, S) int64: drafts as answers of their own, for EventGPT's sentences are further
        text about the same streets. S more positions follow, of which output i proposes text[:, i] from text[:, :i].
        """
        assert draft.shape[1] <= self.config.max_seq_len, (draft.shape, self.config.max_seq_len)
        if not self.config.sees_prefix:
            return self._blocks(self.embedding(draft) + self.position_embedding.weight[:draft.shape[1]])
        before = draft.shape[1] if self.config.conditioning == "prefix+draft" else 0
        parts = [draft[:, :before], prefix, *([] if text is None else [text[:, :-1]])]
        # Looked up together: each lookup's gradient is a table of the whole vocabulary.
        parts = self.embedding(torch.cat(parts, 1)).split([part.shape[1] for part in parts], 1)
        x = [self._embed_draft(parts[0])] if before else []
        x += [self._embed_answer(parts[1])] + [self._embed_answer(part) + self.as_draft for part in parts[2:]]
        first = before + prefix.shape[1] + 1
        mask = self._mask_of(draft_lengths, before, first) if before else None
        sizes = None if text is None else (first, text.shape[1])
        return self._blocks(self.embedding_dropout(torch.cat(x, 1)), mask, sizes=sizes)[:, before:]

    def _mask_of(self, draft_lengths, before: int, positions: int):
        """(B, 1, positions, positions) bool: what each position of a draft (`before` of them) and an answer sees."""
        slots = torch.arange(positions, device=draft_lengths.device)
        shown = slots[:before] < draft_lengths[:, None]                                      # (B, before)
        mask = (slots <= slots[:, None]).expand(len(shown), -1, -1).clone()
        # Every position sees the whole draft; past its end a position sees itself, for a softmax needs something.
        mask[:, :, :before] = shown[:, None] | (slots[:before] == slots[:, None])
        return mask[:, None]

    def ids_of(self, columns):
        """Columns of the logits -> token ids, of any shape."""
        return columns if self.output_ids is None else self.output_ids[columns]

    def labels_of(self, ids):
        """Token ids -> columns of the logits, any shape; NOT_SCORED (and whatever isn't scored) -> NOT_SCORED."""
        if self.output_ids is None:
            return ids
        columns = torch.searchsorted(self.output_ids, ids).clamp(max=len(self.output_ids) - 1)
        return columns.masked_fill(self.output_ids[columns] != ids, NOT_SCORED)

    def output(self) -> tuple:
        """(norm, weight (K, D), bias (K,)): logits are norm(x) @ weight.T + bias, one column for each id scored."""
        norm, linear = self.output_proj
        if self.output_ids is None:
            return norm, linear.weight, linear.bias
        return norm, linear.weight.index_select(0, self.output_ids), linear.bias.index_select(0, self.output_ids)

    def _logits(self, x):                                    # (B, T, D) -> (B, T, ids scored)
        norm, weight, bias = self.output()
        if x.is_cuda and x.dtype == torch.bfloat16:          # rounded to that, the best two would often be alike
            logits = torch.mm(norm(x).flatten(0, -2), weight.t(), out_dtype=torch.float32) + bias
            return logits.view(*x.shape[:-1], -1)
        return F.linear(norm(x), weight, bias)

    def _embed_draft(self, x):                         # (B, T, D) of the tokens -> (B, T, D)
        return x + self.position_embedding.weight[:x.shape[1]] + self.as_draft

    def _embed_answer(self, x):                        # (B, T, D) -> (B, T + 1, D): begin-of-answer in front
        x = torch.cat([self.begin.expand(len(x), 1, -1), x], dim=1)
        return x + self.position_embedding.weight[:x.shape[1]]

    def _blocks(self, x, mask=None, cache=None, slots=None, sizes=None):
        for number, block in enumerate(self.transformer["layers"]):
            x = block(x, mask, None if cache is None else cache.values[number], slots, sizes)
        return x

    # ------------------------------------------------------------------------------------------- step by step
    def start(self, draft, draft_lengths, cache: Cache | None = None) -> tuple:
        """Read drafts (B, Td) int64 of lengths (B,) -> (logits (B, 1, V) of position 0, the cache)."""
        cache = cache or Cache(self.config, len(draft), self.begin.detach())
        before = draft.shape[1] if self.config.conditioning == "prefix+draft" else 0
        x = (self.begin + self.position_embedding.weight[0]).expand(len(draft), 1, -1)
        seen = cache.slots <= cache.slots[:, None].clamp(min=before - 1)                  # a draft sees all of itself
        if before:
            x = torch.cat([self._embed_draft(self.embedding(draft)), x], dim=1)
            inside = (cache.slots >= before) | (cache.slots < draft_lengths[:, None])
            seen = inside[:, None] & seen | (cache.slots == cache.slots[:, None])
        cache.masks.copy_(added(seen.expand(len(draft), -1, -1)))
        places = (cache.slots - before).clamp(0, self.config.max_seq_len - 1)             # beyond: never looked at
        cache.positions.copy_(self.position_embedding(places))
        x = self._blocks(x, cache.masks[:, :, :before + 1], cache, cache.slots[:before + 1])
        cache.length = before + 1
        return self._logits(x[:, -1:]), cache

    def step(self, tokens, cache: Cache):
        """The next tokens (B, T) int64, verified or proposed -> logits (B, T, V) of what follows each.

        The result equals the full pass. To take back the last n tokens: cache.length -= n.
        """
        slots = cache.slots[cache.length:cache.length + tokens.shape[1]]
        cache.length += tokens.shape[1]
        return self.step_at(tokens, slots, cache)

    def step_at(self, tokens, slots, cache: Cache):
        """`step` at slots (T,) int64; nothing here depends on the host, so that a CUDA graph can hold it."""
        x = self.embedding(tokens) + cache.positions.index_select(0, slots)
        return self._logits(self._blocks(x, cache.masks.index_select(2, slots), cache, slots))

    def condition(self, conditioning: str) -> None:
        """Go on as `prefix` or `prefix+draft`: they have the same weights and differ in what is shown."""
        assert self.config.sees_prefix == (conditioning != "draft"), (self.config.conditioning, conditioning)
        self.config = dataclasses.replace(self.config, conditioning=conditioning, contract=CONTRACTS[conditioning])

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


class SingleStep:
    """`step_at` for one token of one answer in three quarters of its kernels: in a graph too, each costs 2 to 3 us.

    Scores begin as the mask and the residual stream as itself, to which products are added in place; the biases of
    products that are added so are a further column of their weights, for an input that is always 1. It keeps copies
    of these weights, as they are now. For a prefix conditioning, whose blocks norm first.
    """

    def __init__(self, adapter: TokenAdapter, cache: Cache):
        self.adapter, self.cache, config = adapter, cache, adapter.config
        blocks = adapter.transformer["layers"]
        self.out, self.linear2 = ([self._with_bias(linear) for linear in linears] for linears in (
            [block.self_attn.out_proj for block in blocks], [block.linear2 for block in blocks]))
        self.mixed, self.inner = (linears[0].new_zeros(1, linears[0].shape[1])
                                  for linears in (self.out, self.linear2))
        self.mixed[:, config.embed_dim] = self.inner[:, config.feedforward_dim] = 1
        self.scores = cache.masks.new_zeros(config.num_layers, config.num_heads, 1, len(cache.slots))

    @staticmethod
    def _with_bias(linear: nn.Linear) -> torch.Tensor:         # (outputs, inputs + 8): in eights, for alignment
        return torch.cat([linear.weight, F.pad(linear.bias[:, None], (0, 7))], 1).detach()

    @torch.inference_mode()
    def __call__(self, token: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """token (1,), slot (1,) int64 -> logits (1, V) of what follows; keys and values are written at the slot."""
        config, cache = self.adapter.config, self.cache
        mixed = self.mixed[:, :config.embed_dim].view(config.num_heads, 1, -1)
        inner = self.inner[:, :config.feedforward_dim]
        x = self.adapter.embedding(token) + cache.positions.index_select(0, slot)
        self.scores.copy_(cache.masks[0].index_select(1, slot))
        for block, values, scores, out, linear2 in zip(self.adapter.transformer["layers"], cache.values, self.scores,
                                                       self.out, self.linear2):
            attention = block.self_attn
            projected = F.linear(block.norm1(x), attention.in_proj_weight, attention.in_proj_bias)
            projected = projected.view(3, config.num_heads, 1, -1)
            key, value = values[:, 0].index_copy_(2, slot, projected[1:])
            scores.baddbmm_(projected[0], key.mT, alpha=projected.shape[-1] ** -0.5)
            torch.bmm(scores.softmax(-1), value, out=mixed)
            x.addmm_(self.mixed, out.t())
            torch.ops.aten.gelu.out(block.linear1(block.norm2(x)), out=inner)
            x.addmm_(self.inner, linear2.t())
        return self.adapter._logits(x)


# ------------------------------------------------------------------------------------------------ checkpoints
def save_adapter(adapter: TokenAdapter, path: Path, **facts) -> None:
    """Write weights, config and plain facts (epoch, ...) into one file, whole or not at all."""
    checkpoint = {
        "model_state_dict": {name: tensor.cpu() for name, tensor in adapter.state_dict().items()},
        "config": dataclasses.asdict(adapter.config),
        **facts,
    }
    write_tensors(path, checkpoint)


def write_tensors(path: Path, value: dict) -> None:
    """torch.save into one file, whole or not at all; the disk's own error when it is full."""
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            try:
                torch.save(value, file)
            except RuntimeError as error:        # PyTorch raises one of its own over that of the disk
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    write_whole(path, write)


def read_tensors(path: Path, words: str):
    """What torch.save wrote, on the CPU; a UserError, with the reason in these words, if it can't be read."""
    check_plain(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # a torn or hostile archive of pickles can raise nearly anything
        raise UserError(f"{path} {words.format(first_line(error)[:200])}") from error


def load_adapter(path: Path) -> TokenAdapter:
    """Read a checkpoint of ours or of the original suite, on the CPU, in eval mode, float32.

    Sizes come from the shapes, what no shape tells from the checkpoint's config. One that records no contract
    is the original suite's, which proposed target[i+1] where we propose target[i].
    """
    if not path.exists():
        raise UserError(f"no such file: {path}")
    checkpoint = read_tensors(path, "is not a checkpoint that can be read: {}")
    state = checkpoint.get("model_state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) and _is_whole(tensor)
                                              for name, tensor in state.items()):
        raise UserError(f"{path} is not an adapter checkpoint: wanted a dict with the weights under "
                             "'model_state_dict'")
    recorded = checkpoint.get("config") if isinstance(checkpoint.get("config"), dict) else {}
    try:
        with torch.device("meta"):                         # the weights come from the file: no random start
            adapter = TokenAdapter(_config_of(state, recorded))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    _check_state(path, state, adapter.state_dict())
    ids = state.get("output_ids")
    if ids is not None and (ids.dtype != torch.long or (ids[1:] <= ids[:-1]).any() or ids[0] < 0
                            or ids[-1] >= adapter.config.vocab_size):
        raise UserError(f"{path}: output_ids must be whole numbers below the vocabulary size "
                        f"{adapter.config.vocab_size}, ascending, each once")
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError(f"{path} has weights that are no numbers (NaN or infinite): train anew")
    adapter.load_state_dict(state, assign=True)
    if adapter.config.sees_prefix:
        adapter.output_proj[1].weight = adapter.embedding.weight       # assigning has parted the tied two
    return adapter.float().eval()


def _is_whole(tensor) -> bool:
    """A tensor whose numbers are all there: a file can also make one of any size from a single number or none."""
    return (isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
            and (tensor.is_floating_point() or tensor.dtype == torch.long)
            and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes())


def _config_of(state: dict, recorded: dict) -> AdapterConfig:
    layers = {int(found[1]) for name in state if (found := re.match(r"transformer\.layers\.(\d+)\.", name))}
    telling = ("embedding.weight", "position_embedding.weight", "transformer.layers.0.linear1.weight")
    shapes = [state[name].shape for name in telling if name in state and state[name].dim() == 2]
    if len(shapes) < len(telling):
        raise UserError(f"not an adapter: wanted two-dimensional {', '.join(telling)}, found {_some(state)}")
    (vocab_size, embed_dim), (max_seq_len, _), (feedforward_dim, _) = shapes
    for name in ("conditioning", "contract"):
        if not isinstance(recorded.get(name, ""), str):
            raise UserError(f"{name} must be a text, got {recorded[name]!r}")
    return AdapterConfig(
        vocab_size=vocab_size, embed_dim=embed_dim, num_layers=len(layers), max_seq_len=max_seq_len,
        feedforward_dim=feedforward_dim,
        num_heads=recorded.get("num_heads", ORIGINAL_NUM_HEADS), dropout=recorded.get("dropout", 0.1),
        conditioning=recorded.get("conditioning", "draft"), draft_vocab=state["output_ids"].numel() if
        "output_ids" in state else 0,
        contract=recorded.get("contract", ORIGINAL_CONTRACT))


def _check_state(path: Path, state: dict, wanted: dict) -> None:
    missing, unexpected = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    if missing or unexpected:
        raise UserError(f"{path} does not fit the adapter: missing {_some(missing)}; "
                             f"not known {_some(unexpected)}")
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise UserError(f"{path} does not fit the adapter: {name} has the shape "
                                 f"{tuple(state[name].shape)}, wanted {tuple(tensor.shape)}")


def _some(names) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "nothing"
