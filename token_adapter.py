"""The TokenAdapter: a small transformer that proposes the target's tokens from the draft's; save and load.

The architecture is that of the original suite: token + learned position embedding, a causal post-norm
encoder (Vaswani et al. 2017, "Attention Is All You Need", with GELU), LayerNorm + Linear to the vocabulary.
The blocks are our own, because nn.TransformerEncoder cannot keep keys and values from one step to the next.
They carry its parameter names, so that checkpoints of the original suite load.
"""

import dataclasses
import pickle
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from base import UserError, write_whole

# What output i of the adapter proposes. It is written into every checkpoint: trained one way and read the
# other, nothing at all is accepted, which is what happened in the original suite.
CONTRACT = "target[i] from draft[:i+1]"
ORIGINAL_CONTRACT = "target[i+1] from draft[:i+1]"
FIRST_POSITION = {CONTRACT: 0, ORIGINAL_CONTRACT: 1}
ORIGINAL_NUM_HEADS = 8


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    vocab_size: int
    conditioning: str = "draft"
    embed_dim: int = 512
    num_layers: int = 4
    num_heads: int = 8
    feedforward_dim: int = 2048
    max_seq_len: int = 128
    dropout: float = 0.1
    contract: str = CONTRACT

    def __post_init__(self):
        if self.conditioning != "draft":
            raise UserError(f"unknown conditioning {self.conditioning!r}, wanted 'draft'")
        if self.contract not in list(FIRST_POSITION):
            raise UserError(f"unknown contract {self.contract!r}, wanted one of {list(FIRST_POSITION)}")
        for name in ("vocab_size", "embed_dim", "num_layers", "num_heads", "feedforward_dim", "max_seq_len"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"{name} must be a whole number of 1 or more, got {value!r}")
        if self.embed_dim % self.num_heads:
            raise UserError(f"num_heads must divide embed_dim, got {self.num_heads} and {self.embed_dim}")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), got {self.dropout!r}")

    @property
    def first_position(self) -> int:
        """The target position that output 0 proposes; those before it are never proposed."""
        return FIRST_POSITION[self.contract]


class SelfAttention(nn.Module):
    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.embed_dim, config.embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * config.embed_dim))
        self.out_proj = nn.Linear(config.embed_dim, config.embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x):                                              # x (B, T, D) -> (B, T, D)
        B, T, D = x.shape
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, T, 3, self.num_heads, -1)
        query, key, value = projected.permute(2, 0, 3, 1, 4)                   # each (B, heads, T, D / heads)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.linear1 = nn.Linear(config.embed_dim, config.feedforward_dim)
        self.linear2 = nn.Linear(config.feedforward_dim, config.embed_dim)
        self.norm1 = nn.LayerNorm(config.embed_dim)
        self.norm2 = nn.LayerNorm(config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):                                              # x (B, T, D) -> (B, T, D)
        x = self.norm1(x + self.dropout(self.self_attn(x)))
        hidden = self.dropout(F.gelu(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))


class TokenAdapter(nn.Module):
    """Sub-modules are named as in the original suite; `transformer.layers` as in nn.TransformerEncoder."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.position_embedding = nn.Embedding(config.max_seq_len, config.embed_dim)
        blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.transformer = nn.ModuleDict({"layers": blocks})
        self.output_proj = nn.Sequential(nn.LayerNorm(config.embed_dim),
                                         nn.Linear(config.embed_dim, config.vocab_size))

    def forward(self, draft):                          # draft (B, T) int64 ids -> logits (B, T, vocab_size)
        """Output i sees draft[:, :i + 1] and proposes target[:, i + config.first_position]."""
        assert draft.shape[1] <= self.config.max_seq_len, (draft.shape, self.config.max_seq_len)
        x = self.embedding(draft) + self.position_embedding.weight[:draft.shape[1]]
        for block in self.transformer["layers"]:
            x = block(x)
        return self.output_proj(x)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


# ------------------------------------------------------------------------------------------------ checkpoints
def save_adapter(adapter: TokenAdapter, path: Path, **facts) -> None:
    """Write weights, config and plain facts (epoch, ...) into one file, whole or not at all."""
    checkpoint = {
        "model_state_dict": {name: tensor.cpu() for name, tensor in adapter.state_dict().items()},
        "config": dataclasses.asdict(adapter.config),
        **facts,
    }
    write_whole(path, lambda temporary: torch.save(checkpoint, temporary))


def load_adapter(path: Path) -> TokenAdapter:
    """Read a checkpoint of ours or of the original suite, on the CPU, in eval mode, float32.

    Sizes come from the shapes, what no shape tells from the checkpoint's config. One that records no contract
    is the original suite's, which proposed target[i+1] where we propose target[i].
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a checkpoint that can be read: {reason[:200]}") from error
    state = checkpoint.get("model_state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{path} is not an adapter checkpoint: wanted a dict with the weights under "
                             "'model_state_dict'")
    recorded = checkpoint.get("config") if isinstance(checkpoint.get("config"), dict) else {}
    try:
        with torch.device("meta"):                         # the weights come from the file: no random start
            adapter = TokenAdapter(_config_of(state, recorded))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    _check_state(path, state, adapter.state_dict())
    adapter.load_state_dict(state, assign=True)
    return adapter.float().eval()


def _config_of(state: dict, recorded: dict) -> AdapterConfig:
    layers = {int(found[1]) for name in state if (found := re.match(r"transformer\.layers\.(\d+)\.", name))}
    telling = ("embedding.weight", "position_embedding.weight", "transformer.layers.0.linear1.weight")
    shapes = [state[name].shape for name in telling if name in state and state[name].dim() == 2]
    if len(shapes) < len(telling):
        raise UserError(f"not an adapter: wanted two-dimensional {', '.join(telling)}, found {_some(state)}")
    (vocab_size, embed_dim), (max_seq_len, _), (feedforward_dim, _) = shapes
    return AdapterConfig(
        vocab_size=vocab_size, embed_dim=embed_dim, num_layers=len(layers), max_seq_len=max_seq_len,
        feedforward_dim=feedforward_dim,
        num_heads=recorded.get("num_heads", ORIGINAL_NUM_HEADS), dropout=recorded.get("dropout", 0.1),
        conditioning=recorded.get("conditioning", "draft"),
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
