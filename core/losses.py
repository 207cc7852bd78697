"""The draft's head and its loss, chunk by chunk, for any token loss that autograd differentiates.

Logits of all rows never exist at once: a chunk's logits are computed, compared with the teacher piece by piece,
replaced by their gradient, and multiplied back. So the peak is one chunk, whatever the vocabulary and the length. The
gradient is computed in the forward pass, as in the fused linear cross-entropy of Liger-Kernel (arXiv 2410.10989).
"""

from typing import NamedTuple

import torch

from core import attention, target_model

PIECE_ROWS = 16  # rows compared at a time on a CPU: they stay in the cache of a core


class Teacher(NamedTuple):
    """What the target says about the next token, read for a few tokens at a time."""

    head: target_model.Head
    last: torch.Tensor  # [T, Ht]: the target's last hidden states
    draft_ids: torch.Tensor  # [Vd]: target ids of the draft vocabulary, ascending

    def read(self, tokens):
        """p [n, Vd] over the draft vocabulary, its mass [n], argmax over the full vocabulary [n]; see Head.teacher."""
        return self.head.teach(self.last[tokens], self.draft_ids)


def head_loss(hidden, weight, row_weights, teacher, plan, token_loss, token_metrics):
    """Loss and metrics of the draft's head.

    hidden [R, H]: normed outputs of the plan's rows; it is overwritten. weight [Vd, H]: the draft's head. row_weights
    [R]. plan: teachers, order, places and chunks as in slots.Plan.
    token_loss(logits [n, Vd], p [n, Vd], mass [n]) -> [n]; token_metrics(logits, p, mass, best [n], draft_ids [Vd]) ->
    {name: [n]}; logits and p in fp32 at least.

    Returns the loss, Σ row_weights · token loss, and {name: [R]} of "loss" and the metrics. A row whose teacher's
    argmax lies outside the draft vocabulary cannot be right: it adds no loss, but its metrics count.
    """
    empty = hidden.new_empty(0, len(weight), dtype=row_weights.dtype)
    nothing = teacher.draft_ids[:0]
    names = list(token_metrics(empty, empty, empty[:, 0], nothing, teacher.draft_ids))
    functions = (token_loss, token_metrics)
    loss, values = HeadLoss.apply(hidden, weight, row_weights, teacher, plan, functions, 1 + len(names))
    return loss, dict(zip(["loss", *names], values, strict=True))


class HeadLoss(torch.autograd.Function):
    """head_loss as one operation of autograd, whose forward pass computes the gradients as well."""

    @staticmethod
    def forward(ctx, hidden, weight, row_weights, teacher, plan, functions, count):
        token_loss, token_metrics = functions
        learns = ctx.needs_input_grad[0]  # not while evaluating
        hidden = hidden.detach()  # each row is replaced by its gradient once it has been read
        weight_grad = torch.zeros_like(weight, dtype=row_weights.dtype) if learns else None
        most = max((stop - row for _, _, row, stop in plan.chunks), default=0)
        buffer = hidden.new_empty(most, len(weight))
        in_vocabulary = torch.zeros(len(teacher.head.weight), dtype=torch.bool, device=hidden.device)
        in_vocabulary.index_fill_(0, teacher.draft_ids, True)
        values = row_weights.new_empty(count, len(hidden))  # losses, then each metric

        for first, end, row, stop in plan.chunks:
            rows = plan.order[row:stop]
            of_row = plan.places[row:stop] - first  # its teacher among the chunk's
            p, mass, best = teacher.read(plan.teachers[first:end])
            learnable = in_vocabulary[best[of_row]]
            x = hidden[rows]
            logits = torch.mm(x, weight.T, out=buffer[: stop - row])
            found = compare(logits, p, mass, best, of_row, teacher.draft_ids, token_loss, token_metrics, learns)
            found[0] = torch.where(learnable, found[0], 0.0)
            values[:, rows] = torch.stack(found)
            if learns:  # logits hold their gradient now
                scale = (row_weights[rows] * learnable)[:, None].to(x.dtype)
                hidden[rows] = (logits @ weight).mul_(scale)
                add_product(weight_grad, logits.T, x.mul_(scale))

        ctx.grads = (hidden, weight_grad)
        ctx.mark_non_differentiable(values)
        return (values[0] * row_weights).sum(), values

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight = ctx.grads
        ctx.grads = None  # or autograd would copy what is still referred to here
        return hidden.mul_(grad), weight.mul_(grad).to(hidden.dtype), None, None, None, None, None


def compare(logits, p, mass, best, of_row, draft_ids, token_loss, token_metrics, learns):
    """Token losses and metrics of a chunk, [[n], ...]; with `learns` the logits [n, Vd] become the losses' gradients.

    p, mass, best: of the chunk's teachers; of_row [n]: which of them each row has.
    """
    on_gpu = logits.is_cuda
    if on_gpu:
        token_loss = attention.compiled(token_loss)
        token_metrics = attention.compiled(token_metrics)
    size = len(logits) if on_gpu else PIECE_ROWS
    pieces = []
    for at in range(0, len(logits), size):
        piece = slice(at, at + size)
        teachers = of_row[piece]
        z = logits[piece].to(p.dtype)
        p_rows = p.index_select(0, teachers)
        mass_rows = mass[teachers]
        metrics = token_metrics(z, p_rows, mass_rows, best[teachers], draft_ids)
        with torch.set_grad_enabled(learns):
            z = z.detach().requires_grad_(learns)
            loss = token_loss(z, p_rows, mass_rows)
            if learns:
                (logits[piece],) = torch.autograd.grad(loss.sum(), z)
        pieces.append([loss.detach(), *[value.to(p.dtype) for value in metrics.values()]])
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)]


def add_product(total, a, b):
    """total += a @ b, added up in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
