"""The adapter on some pairs beside both baselines, over every target position, however long the
answers are.
"""

import math

import numpy as np

from acceptance.metrics import Tally, blocks, measure, rows_of_block
from acceptance.tensors import TokenTensors, predict
from base import UserError, log
from drafting.baselines import commonest_tokens, direct_copy
from pairs.pairs import Pairs
from token_adapter import TokenAdapter


def measure_adapter(adapter: TokenAdapter, pairs: Pairs, training: Pairs | None, batch_size: int,
                    name: str) -> dict:
    """{"loss": nats a token, and all of `compare`}; a UserError when the adapter's logits are no
    numbers.

    training: pairs whose commonest tokens are the constant string; name: of the pairs, for
    messages.
    """
    longest = adapter.config.max_seq_len
    tokens = TokenTensors.of(pairs, longest, next(adapter.parameters()).device)
    if longer := int((tokens.lengths > longest).sum()):
        past = int(np.maximum(tokens.lengths - longest, 0).sum())
        log(f"evaluate | WARNING | {longer} of {len(pairs)} {name} answers are longer than "
            f"--max_seq_len {longest}: the adapter proposes nothing for "
            f"{past / tokens.lengths.sum():.1%} of the positions, which count as misses")
    top1, top5, loss = predict(adapter, tokens, batch_size)
    if not math.isfinite(loss):
        raise UserError(f"the adapter's logits on the {name} pairs are no numbers (NaN or "
                        "infinite): its training diverged or its file is damaged; train anew with "
                        "a smaller --learning_rate, or measure another --checkpoint")
    return {"loss": loss, **compare(top1, top5, pairs, training)}


def compare(top1: np.ndarray, top5: np.ndarray, pairs: Pairs, training: Pairs | None) -> dict:
    """The adapter's hits (N, T) on these pairs, and both baselines.

    Every target position counts for all three; pairs without drafts have no copy of them. Past T,
    where the adapter proposes nothing, its positions are misses.
    """
    lengths = pairs.lengths("target")
    width = int(lengths.max())
    commonest = commonest_tokens(training, width) if training else None
    copied, constant = Tally(width), Tally(width)
    for rows, part in zip(blocks(len(pairs), width), pairs.parts(rows_of_block(width))):
        longest = int(lengths[rows].max())
        target = part.padded("target", longest)
        copied.add(lengths[rows], direct_copy(part, longest) == target)
        if commonest is not None:
            right = commonest[:longest] == target[:, :, None]
            constant.add(lengths[rows], right[:, :, 0], right.any(-1))
    adapter = measure(top1, lengths, top5)
    copy = copied.metrics(with_top5=False) if pairs.has_drafts else None
    return {
        "pairs": len(pairs),
        "positions": int(lengths.sum()),
        "positions_past_max_seq_len": int(np.maximum(lengths - top1.shape[1], 0).sum()),
        "improvement": adapter["alpha"] - copy["alpha"] if copy else None,
        "adapter": adapter,
        "direct_copy": copy,
        "constant_string": None if commonest is None else constant.metrics(),
    }
