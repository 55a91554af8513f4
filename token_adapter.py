"""The TokenAdapter: a small transformer that proposes the target's next tokens. Needs base.py alone.

    adapter = TokenAdapter.from_pretrained("folder")          # or a hub id, "organisation/name"

Three ways to condition it, through the same blocks:

    draft          output i sees draft[:i+1]: the original suite's architecture, exactly (post-norm)
    prefix         output i sees target[:i], the tokens verified so far
    prefix+draft   output i sees target[:i] and the whole draft before it

The blocks are our own, because nn.TransformerEncoder has no key/value cache; with its parameter
names, so that checkpoints of the original suite load. Vaswani et al. 2017, with GELU; prefix
conditioning adds pre-norm (Xiong et al. 2020) and tied embeddings (Press and Wolf 2017).
"""

import dataclasses
import functools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from base import LARGEST, UserError, first_line

# What output i of the adapter proposes, written into every checkpoint: in the original suite an
# adapter was trained by one contract and used by another, and nothing was accepted.
CONTRACTS = {"draft": "target[i] from draft[:i+1]", "prefix": "target[i] from target[:i]",
             "prefix+draft": "target[i] from target[:i] and the whole draft"}
ORIGINAL_CONTRACT = "target[i+1] from draft[:i+1]"
NOT_SCORED = -100            # a label that cross_entropy ignores by default, and equal to no column
FORMAT = 1                   # of config.json
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
TIED = "output_proj.1.weight"       # is the embedding's in prefix conditionings, and not in the file
MAX_CONFIG = 2**20             # bytes
MAX_WEIGHTS = 3 * 2**30        # bytes: 17 times the default adapter in float32
# Sizes beyond these are damage; most are the limits of the flags that set them.
MAX_SIZES = {"vocab_size": 2**20, "feedforward_dim": 4 * LARGEST["embed_dim"],
             **{name: LARGEST[name] for name in ("embed_dim", "num_layers", "num_heads", "max_seq_len")}}


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
    draft_vocab: int = 0             # number of ids that are scored; 0: all of the vocabulary
    draft_embeddings: int = 0        # ids of the draft's own tokenizer; 0: draft and target share one
    draft_tokenizer: str = ""        # digests of the vocabularies (vlm/vocabulary.py); "": unknown
    target_tokenizer: str = ""

    def __post_init__(self):
        if self.conditioning not in CONTRACTS:
            raise UserError(f"unknown conditioning {self.conditioning!r}, wanted one of {list(CONTRACTS)}")
        if not self.contract:
            object.__setattr__(self, "contract", CONTRACTS[self.conditioning])
        original = self.conditioning == "draft" and self.contract == ORIGINAL_CONTRACT
        if self.contract != CONTRACTS[self.conditioning] and not original:
            raise UserError(f"unknown contract {self.contract!r} for conditioning "
                            f"{self.conditioning}, wanted {CONTRACTS[self.conditioning]!r}")
        for name, limit in MAX_SIZES.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise UserError(f"{name} must be a whole number from 1 to {limit}, got {value!r:.40}")
        for name, limit in (("draft_vocab", self.vocab_size), ("draft_embeddings", MAX_SIZES["vocab_size"])):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= limit:
                raise UserError(f"{name} must be from 0 to the vocabulary size {limit}, got {value!r:.40}")
        if self.embed_dim % self.num_heads:
            raise UserError(f"num_heads must divide embed_dim, got {self.num_heads} and {self.embed_dim}")
        if not (isinstance(self.draft_tokenizer, str) and isinstance(self.target_tokenizer, str)):
            raise UserError("draft_tokenizer and target_tokenizer must be texts")
        if not isinstance(self.dropout, float) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), got {self.dropout!r}")

    @property
    def first_position(self) -> int:
        """The target position that output 0 proposes; earlier ones are never proposed."""
        return 1 if self.contract == ORIGINAL_CONTRACT else 0

    @property
    def outputs(self) -> int:
        """Number of ids that are scored."""
        return self.draft_vocab or self.vocab_size

    @property
    def sees_prefix(self) -> bool:
        return self.conditioning != "draft"


class Cache:
    """Keys and values of a batch: the draft, then begin-of-answer and the answer.

    To take back tokens, reduce `length`. Slots are numbered by tensors and masks span all of them: a
    CUDA graph can replay a step, which takes rows of the tables of masks and positions.
    """

    SPARE = 16               # slots that a graph of more tokens than are left may write; never seen

    def __init__(self, config: AdapterConfig, batch: int, like: torch.Tensor, spare: int = SPARE):
        """like: a weight of the adapter; the cache takes its device and dtype."""
        heads, room = config.num_heads, 2 * config.max_seq_len + spare
        self.values = like.new_zeros(config.num_layers, 2, batch, heads, room, config.embed_dim // heads)
        self.slots = torch.arange(room, device=like.device)
        self.masks = like.new_zeros(batch, 1, room, room)      # row of a slot: 0 where it sees, else -inf
        self.positions = like.new_zeros(room, config.embed_dim)       # row of a slot: its embedding
        self.length = 0


class SelfAttention(nn.Module):
    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.embed_dim, config.embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * config.embed_dim))
        self.out_proj = nn.Linear(config.embed_dim, config.embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, visible=None, sizes=None):
        """A whole pass: x (B, T, D) -> (B, T, D).

        visible (B, 1, T, T) bool: what each position sees; None: itself and those before it. sizes:
        lengths of texts that don't see each other, of which `visible` is for the first; None: one.
        """
        projected = self._project(x)
        texts = projected.split(sizes or x.shape[1], 3)
        dropout = self.dropout if self.training else 0.0
        attended = [F.scaled_dot_product_attention(*text, mask, dropout, is_causal=mask is None)
                    for text, mask in zip(texts, [visible, *[None] * (len(texts) - 1)])]
        return self._merge(torch.cat(attended, 2) if len(texts) > 1 else attended[0])

    def step(self, x, cached, slots, mask):
        """A pass over the next positions: x (B, T, D) -> (B, T, D).

        cached (2, B, heads, S, D / heads): keys and values of all slots, those of x to be written at
        slots (T,) int64. mask (B, 1, T, S): added to the scores, 0 where seen, else -inf.
        """
        projected = self._project(x)
        query, (key, value) = projected[0], cached.index_copy_(3, slots, projected[1:])
        # Not fused: for one position in float32 an H200's fused kernel took 39 us, 40 % of a step.
        scores = torch.add(mask, query @ key.mT, alpha=query.shape[-1] ** -0.5)
        return self._merge(scores.softmax(-1) @ value)

    def _project(self, x):                                # (B, T, D) -> (3, B, heads, T, D / heads)
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        return projected.view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)

    def _merge(self, attended):                            # (B, heads, T, D / heads) -> (B, T, D)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.norm_first = config.sees_prefix
        self.self_attn = SelfAttention(config)
        self.linear1 = nn.Linear(config.embed_dim, config.feedforward_dim)
        self.linear2 = nn.Linear(config.feedforward_dim, config.embed_dim)
        self.norm1, self.norm2 = nn.LayerNorm(config.embed_dim), nn.LayerNorm(config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, attend):
        """x (B, T, D) -> (B, T, D); attend: self_attn or its step, given what it sees."""
        if self.norm_first:
            x = x + self.dropout(attend(self.norm1(x)))
            return x + self.dropout(self.feed_forward(self.norm2(x)))
        x = self.norm1(x + self.dropout(attend(x)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))

    def feed_forward(self, x):
        return self.linear2(self.dropout(F.gelu(self.linear1(x))))


class TokenAdapter(nn.Module, PyTorchModelHubMixin, library_name="eventgpt-drafts-video-llava",
                   tags=["speculative-decoding"]):
    """Sub-modules are named as in the original suite, layers as in nn.TransformerEncoder.

    output_ids (K,) int64, ascending: the ids that are scored, when not all are (as in Zhao et al.
    2025, "FR-Spec"). Logits then have K columns: ids_of() and labels_of() translate.
    """

    def __init__(self, config: AdapterConfig, output_ids: torch.Tensor | None = None):
        super().__init__()
        self.config = config
        if output_ids is None and config.draft_vocab:
            output_ids = torch.empty(config.draft_vocab, dtype=torch.long)   # a checkpoint fills it
        self.register_buffer("output_ids", output_ids)
        drafts = 0 if config.sees_prefix else config.draft_embeddings     # all that `draft` embeds
        self.embedding = nn.Embedding(drafts or config.vocab_size, config.embed_dim)
        self.position_embedding = nn.Embedding(config.max_seq_len, config.embed_dim)
        blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.transformer = nn.ModuleDict({"layers": blocks})
        self.output_proj = nn.Sequential(nn.LayerNorm(config.embed_dim),
                                         nn.Linear(config.embed_dim, config.vocab_size))
        if config.sees_prefix:
            self.begin = nn.Parameter(torch.empty(config.embed_dim))           # begin-of-answer
            self.as_draft = nn.Parameter(torch.empty(config.embed_dim))      # added to draft tokens
            self.embedding_dropout = nn.Dropout(config.dropout)
            own = config.draft_embeddings
            self.draft_embedding = nn.Embedding(own, config.embed_dim) if own else None
            tables = [self.embedding, self.position_embedding, *[self.draft_embedding] * bool(own)]
            for weight in (self.begin, self.as_draft, *(table.weight for table in tables)):
                nn.init.normal_(weight, std=0.02)
            self.output_proj[1].weight = self.embedding.weight

    # --------------------------------------------------------------------------------- a whole pass
    def forward(self, draft, draft_lengths=None, prefix=None):
        """One full pass -> logits; output i proposes target[:, i + config.first_position].

        draft (B, Td) int64 ids. Draft conditioning: (B, T) -> (B, T, vocab_size), output i sees
        draft[:, :i + 1]. Prefix conditionings: prefix (B, T) int64, verified target tokens
        -> (B, T + 1, vocab_size), output i sees prefix[:, :i] and, in prefix+draft, the first
        draft_lengths (B,) tokens of the draft. A length of 0 is a missing draft.
        """
        return self._logits(self.hidden(draft, draft_lengths, prefix))

    def hidden(self, draft, draft_lengths=None, prefix=None, text=None):
        """The states x (B, T, D) from which `output` makes the logits of `forward`.

        text (B, S) int64, only in training: drafts as answers of their own, further text about the
        same streets. S more positions follow: output i proposes text[:, i] from text[:, :i]."""
        assert draft.shape[1] <= self.config.max_seq_len, (draft.shape, self.config.max_seq_len)
        if not self.config.sees_prefix:
            return self._blocks(self.embedding(draft) + self.position_embedding.weight[:draft.shape[1]])
        before = draft.shape[1] if self.config.conditioning == "prefix+draft" else 0
        own = self.draft_embedding if before else None
        parts = [draft[:, :0 if own else before], prefix, *([] if text is None else [text[:, :-1]])]
        # Looked up together, because each lookup's gradient is a table of the whole vocabulary.
        parts = self.embedding(torch.cat(parts, 1)).split([part.shape[1] for part in parts], 1)
        x = [self._embed_draft(own(draft) if own else parts[0])] if before else []
        x += [self._embed_answer(parts[1])]
        x += [self._embed_answer(part) + self.as_draft for part in parts[2:]]
        first = before + prefix.shape[1] + 1
        visible = self._visible(draft_lengths, before, first) if before else None
        sizes = None if text is None else (first, text.shape[1])
        return self._blocks(self.embedding_dropout(torch.cat(x, 1)), visible, sizes)[:, before:]

    def _blocks(self, x, visible=None, sizes=None):
        for block in self.transformer["layers"]:
            x = block(x, functools.partial(block.self_attn, visible=visible, sizes=sizes))
        return x

    def _visible(self, draft_lengths, before: int, positions: int):
        """(B, 1, positions, positions) bool: what positions of a draft (`before`) and an answer see."""
        slots = torch.arange(positions, device=draft_lengths.device)
        inside = slots[:before] < draft_lengths[:, None]                               # (B, before)
        visible = (slots <= slots[:, None]).expand(len(inside), -1, -1).clone()
        # All see the whole draft; positions past its end see themselves, for the softmax's sake.
        visible[:, :, :before] = inside[:, None] | (slots[:before] == slots[:, None])
        return visible[:, None]

    def ids_of(self, columns):
        """Columns of the logits -> token ids, any shape."""
        return columns if self.output_ids is None else self.output_ids[columns]

    def labels_of(self, ids):
        """Token ids, any shape -> columns of the logits; NOT_SCORED for ids that aren't scored."""
        if self.output_ids is None:
            return ids
        columns = torch.searchsorted(self.output_ids, ids).clamp(max=len(self.output_ids) - 1)
        return columns.masked_fill(self.output_ids[columns] != ids, NOT_SCORED)

    def output(self) -> tuple:
        """(norm, weight (K, D), bias (K,)): logits are norm(x) @ weight.T + bias."""
        norm, linear = self.output_proj
        weight, bias = linear.weight, linear.bias
        if self.output_ids is not None:
            weight, bias = weight.index_select(0, self.output_ids), bias.index_select(0, self.output_ids)
        return norm, weight, bias

    def _logits(self, x):                                    # (B, T, D) -> (B, T, K)
        norm, weight, bias = self.output()
        # rounded to bfloat16 the best two are often equal
        if x.is_cuda and x.dtype == torch.bfloat16:
            logits = torch.mm(norm(x).flatten(0, -2), weight.t(), out_dtype=torch.float32) + bias
            return logits.view(*x.shape[:-1], -1)
        return F.linear(norm(x), weight, bias)

    def _embed_draft(self, x):                         # (B, T, D) of the tokens -> (B, T, D)
        return x + self.position_embedding.weight[:x.shape[1]] + self.as_draft

    def _embed_answer(self, x):                  # (B, T, D) -> (B, T + 1, D): begin-of-answer first
        x = torch.cat([self.begin.expand(len(x), 1, -1), x], dim=1)
        return x + self.position_embedding.weight[:x.shape[1]]

    # --------------------------------------------------------------------------------- step by step
    def start(self, draft, draft_lengths, cache: Cache | None = None) -> tuple:
        """Read drafts (B, Td) int64 of lengths (B,) -> (logits (B, 1, V) of position 0, cache)."""
        cache = cache or Cache(self.config, len(draft), self.begin.detach())
        before = draft.shape[1] if self.config.conditioning == "prefix+draft" else 0
        x = (self.begin + self.position_embedding.weight[0]).expand(len(draft), 1, -1)
        # a draft sees all of itself
        visible = cache.slots <= cache.slots[:, None].clamp(min=before - 1)
        if before:
            x = torch.cat([self._embed_draft((self.draft_embedding or self.embedding)(draft)), x], dim=1)
            inside = (cache.slots >= before) | (cache.slots < draft_lengths[:, None])
            visible = inside[:, None] & visible | (cache.slots == cache.slots[:, None])
        cache.masks.copy_(torch.where(visible.expand(len(draft), -1, -1), 0.0, -torch.inf)[:, None])
        # later ones are never used
        places = (cache.slots - before).clamp(0, self.config.max_seq_len - 1)
        cache.positions.copy_(self.position_embedding(places))
        x = self._cached_blocks(x, cache, cache.slots[:before + 1], cache.masks[:, :, :before + 1])
        cache.length = before + 1
        return self._logits(x[:, -1:]), cache

    def step(self, tokens, cache: Cache):
        """Tokens (B, T) int64, verified or proposed -> logits (B, T, V) of what follows each.

        The result equals the full pass. To take back the last n tokens: cache.length -= n.
        """
        slots = cache.slots[cache.length:cache.length + tokens.shape[1]]
        cache.length += tokens.shape[1]
        return self.step_at(tokens, slots, cache)

    def step_at(self, tokens, slots, cache: Cache, places=None, mask=None):
        """`step` at slots (T,) int64, for a CUDA graph: independent of the host.
        places (T,): the slots whose positions they take, if not their own; mask: as for a block."""
        mask = cache.masks.index_select(2, slots) if mask is None else mask
        x = self.embedding(tokens) + cache.positions.index_select(0, slots if places is None else places)
        return self._logits(self._cached_blocks(x, cache, slots, mask))

    def _cached_blocks(self, x, cache: Cache, slots, mask):
        for number, block in enumerate(self.transformer["layers"]):
            cached = cache.values[number]
            x = block(x, functools.partial(block.self_attn.step, cached=cached, slots=slots, mask=mask))
        return x

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    # -------------------------------------------------------------------------------- files, the hub
    def save_pretrained(self, save_directory, *, config=None, **options):
        """Write model.safetensors, config.json (with the keys of the dict `config` too) and, where
        there is none, README.md. options, push_to_hub: huggingface_hub.ModelHubMixin."""
        config = {**(config or {}), "format": FORMAT, **dataclasses.asdict(self.config)}
        return super().save_pretrained(save_directory, config=config, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        weights = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        if self.config.sees_prefix:
            del weights[TIED]
        save_file(weights, save_directory / WEIGHTS_FILE, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **options):
        """The adapter of a folder that save_pretrained wrote, or of a hub id; on the CPU, in eval
        mode, float32. options: of hf_hub_download. Raises UserError for a missing or damaged one."""
        folder = Path(pretrained_model_name_or_path)
        name, files = str(folder), [folder / CONFIG_FILE, folder / WEIGHTS_FILE]
        try:
            if not folder.is_dir():
                files = [Path(hf_hub_download(name, file.name, **options)) for file in files]
            for file, limit in zip(files, (MAX_CONFIG, MAX_WEIGHTS)):
                if not file.is_file() or file.stat().st_size > limit:
                    raise ValueError(f"wanted {file.name} there, of at most {limit:,} bytes")
            values, state = json.loads(files[0].read_bytes()), load_file(files[1])
            number = values.get("format") if isinstance(values, dict) else None
            if number != FORMAT:
                raise UserError(f"{CONFIG_FILE} has format {number!r:.40}, this version reads {FORMAT}")
            config = AdapterConfig(**{field.name: values.get(field.name, field.default)
                                      for field in dataclasses.fields(AdapterConfig)})
            if config.sees_prefix and "embedding.weight" in state:
                state[TIED] = state["embedding.weight"]
            return cls.of_weights(config, state)
        except (UserError, TypeError, ValueError, OSError, SafetensorError, RecursionError) as error:
            kind = "the folder of an adapter" if folder.is_dir() else "a folder, nor an adapter of the hub"
            raise UserError(f"{name} is not {kind} ({first_line(error)}); wanted what export_adapter.py "
                            "or save_pretrained wrote") from error

    @classmethod
    def of_weights(cls, config: AdapterConfig, state: dict) -> "TokenAdapter":
        """The adapter of these weights, in eval mode, float32; a UserError unless they fit."""
        with torch.device("meta"):                         # no random weights: the state has them
            adapter = cls(config)
        for name, tensor in state.items():
            if not (tensor.dtype == torch.long if name == "output_ids" else tensor.is_floating_point()):
                raise UserError(f"{name} must not be {tensor.dtype}")
        try:
            adapter.load_state_dict(state, assign=True)
        except RuntimeError as error:                      # names and shapes, one a line
            raise UserError(" ".join(str(error).split())[:300]) from error
        ids = state.get("output_ids", torch.zeros(1))
        if (ids.diff() <= 0).any() or ids[0] < 0 or ids[-1] >= config.vocab_size:
            raise UserError(f"output_ids must be ascending ids below {config.vocab_size}")
        if config.sees_prefix:
            adapter.output_proj[1].weight = adapter.embedding.weight   # assigning has untied them
        if not all(weight.isfinite().all() for weight in adapter.float().parameters()):
            raise UserError("it has weights that are not finite numbers: train again")
        return adapter.eval()
