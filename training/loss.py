"""The loss of a training step: output layer and cross entropy in one function that never holds all
logits.
"""

from __future__ import annotations

import torch

from token_adapter import NOT_SCORED, TokenAdapter

# share of training rows whose draft is hidden, so that the adapter can do without
DRAFT_DROPOUT = 0.5
LOGITS_AT_A_TIME = {"cpu": 2**23, "cuda": 2**27}      # 262 or 4,194 positions of 32,000 ids
DENSE_SHARE = 0.9          # of positions scored: above it, selecting them costs more than it saves


class LinearCrossEntropy(torch.autograd.Function):
    """Output layer and loss in one, a chunk of positions at a time; gradients are computed on the
    way.

    The idea of Liger Kernel and of "Cut Your Losses" (Wijmans et al. 2024), in plain PyTorch:
    logits and their gradient exist for one chunk only, and both weight gradients are computed while
    they do.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, labels, share):
        """x (N, D), weight (V, D), bias (V,), labels (N,) int64; share (N,): factor of each
        position's loss.

        A position that is not scored has share 0. Returns the loss to learn from, sum(share *
        losses), and for inspection losses (N,) in nats and hits (N,) bool.
        """
        labels, share = labels.clamp(min=0)[:, None], share[:, None]
        x_grad = torch.empty_like(x)
        weight_grad, bias_grad = torch.zeros_like(weight), torch.zeros_like(bias)
        losses, hits = torch.empty_like(share), torch.empty_like(labels, dtype=torch.bool)
        size = max(1, LOGITS_AT_A_TIME.get(x.device.type, LOGITS_AT_A_TIME["cpu"]) // len(weight))
        chunks = zip(*(tensor.split(size) for tensor in (x, x_grad, labels, share, losses, hits)))
        for x_chunk, x_grad_chunk, label, factor, loss, hit in chunks:
            logits = torch.addmm(bias, x_chunk, weight.t())
            top, best = logits.max(-1, keepdim=True)
            grad = torch.softmax(logits, -1)
            # Not -log(probability): that of a label far from the top is rounded to 0.
            loss.copy_((top.to(loss) - logits.gather(1, label)) -
                       grad.gather(1, best).to(loss).log())
            torch.eq(best, label, out=hit)
            grad.scatter_(1, label, grad.gather(1, label) - 1)   # of the logits, but for the factor
            torch.mul(grad @ weight, factor, out=x_grad_chunk)
            weight_grad.addmm_(grad.t(), (x_chunk * factor).to(x_chunk))
            bias_grad.add_((factor.to(grad).t() @ grad)[0])
        ctx.save_for_backward(x_grad, weight_grad, bias_grad)
        losses, hits = losses[:, 0], hits[:, 0]
        ctx.mark_non_differentiable(losses, hits)
        return (losses * share[:, 0]).sum(), losses, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, factor, *_):
        x_grad, weight_grad, bias_grad = ctx.saved_tensors
        return x_grad.mul_(factor), weight_grad.mul_(factor), bias_grad.mul_(factor), None, None


def loss_of(adapter: TokenAdapter, target, draft, draft_lengths, draft_text: float,
            part: slice = slice(None)) -> tuple:
    """(the loss to learn from, (2,): mean loss of the answers' tokens and how many of them were
    proposed right).

    target (B, T) int64, NOT_SCORED past the end; draft (B, Td) int64 of draft_lengths (B,).
    draft_text: weight of the mean loss of the drafts' tokens, each predicted from those before it,
    as if drafts were answers; a token that the adapter doesn't score costs nothing. The adapter is
    in training mode: with its dropout, and in prefix+draft with half of all drafts hidden.
    part: the rows to compute; means are still over the positions of all rows, so that the results
    of all parts add up to those of the batch.
    """
    scored_of_all = (adapter.labels_of(target) != NOT_SCORED).sum().clamp(min=1)
    text_of_all = draft_lengths.clamp(max=draft.shape[1]).sum().clamp(min=1)
    target, draft, draft_lengths = target[part], draft[part], draft_lengths[part]
    labels = adapter.labels_of(target)
    scored = (labels != NOT_SCORED).float()
    shares = answers = scored / scored_of_all
    if not adapter.config.sees_prefix:
        x = adapter.hidden(draft)
    else:
        shown = draft_lengths
        if adapter.config.conditioning == "prefix+draft":
            shown = draft_lengths * (torch.rand(len(draft), device=draft.device) >= DRAFT_DROPOUT)
        prefix = target[:, :-1].clamp(min=0)                           # past the end any id will do
        x = adapter.hidden(draft, shown, prefix, draft if draft_text else None)
        if draft_text:
            inside = torch.arange(draft.shape[1], device=draft.device) < draft_lengths[:, None]
            text = adapter.labels_of(draft.masked_fill(~inside, NOT_SCORED))
            share = draft_text * (text != NOT_SCORED) / text_of_all
            labels, shares = torch.cat([labels, text], 1), torch.cat([shares, share], 1)
            answers = torch.cat([answers, torch.zeros_like(share)], 1)
    x, labels = x.flatten(0, 1), labels.flatten()
    shares, answers = shares.flatten(), answers.flatten()
    scored = labels != NOT_SCORED
    # Positions that aren't scored have share 0. On a CPU they are left out; on a GPU counting would
    # wait for it.
    if x.device.type == "cpu" and scored.sum() < DENSE_SHARE * len(scored):
        rows = scored.nonzero()[:, 0]
        x, labels = x.index_select(0, rows), labels[rows]
        shares, answers = shares[rows], answers[rows]
    norm, weight, bias = adapter.output()
    loss, losses, hits = LinearCrossEntropy.apply(norm(x), weight, bias, labels, shares)
    return loss, torch.stack([(losses * answers).sum(), (hits & (answers > 0)).sum().to(losses)])
