"""The draft's head and its loss, chunk by chunk, for any token loss that autograd differentiates.

Logits of all rows never exist at once: a chunk's logits are computed, compared with the teacher piece by piece,
replaced by their gradient, and multiplied back. So the peak is one chunk, whatever the vocabulary and the length. The
gradient is computed in the forward pass, as in the fused linear cross-entropy of Liger-Kernel (arXiv 2410.10989).
"""

from typing import NamedTuple

import torch

from core import attention, slots, target_model

PIECE_ROWS = 16  # rows compared at a time on a CPU: they stay in the cache of a core


class Teacher(NamedTuple):
    """What the target says about the next token, read for a few tokens at a time."""

    head: target_model.Head
    last: torch.Tensor  # [T, Ht]: the target's last hidden states
    draft_ids: torch.Tensor  # [Vd]: target ids of the draft vocabulary, ascending

    def in_vocabulary(self):
        """bool [V]: the target's tokens that are in the draft vocabulary."""
        size = len(self.head.weight)
        marks = torch.zeros(size, dtype=torch.bool, device=self.last.device)
        return marks.index_fill_(0, self.draft_ids, True)

    def read(self, tokens):
        """p [n, Vd] over the draft vocabulary, its mass [n], argmax over the full vocabulary [n]; see Head.teacher."""
        return self.head.teacher(self.last[tokens], self.draft_ids)


def head_loss(
    hidden,  # [R, H]: normed outputs of the plan's rows; it is overwritten
    weight,  # [Vd, H]: the draft's head
    row_weights,  # [R]
    teacher,  # Teacher
    plan,  # its teachers, order, places and chunks are read, as of slots.Plan
    token_loss,
    token_metrics,
    further=None,  # [Vd, r]: the last columns of the head; hidden is [R, H + r] then
    weigh=None,  # (values of a chunk {name: [n]}, its first row in plan.order) -> [n], a factor of row_weights
):
    """Loss and metrics of the draft's head.

    token_loss(logits [n, Vd], p [n, Vd], mass [n]) -> [n]; token_metrics(logits, p, mass, best [n], draft_ids [Vd]) ->
    {name: [n]}; logits and p in fp32 at least.

    Returns the loss, Σ row_weights · token loss, and {name: [R]} of "loss" and the metrics. A row whose teacher's
    argmax lies outside the draft vocabulary cannot be right: it adds no loss, but its metrics count.
    """
    empty = hidden.new_empty(0, len(weight), dtype=row_weights.dtype)
    nothing = teacher.draft_ids[:0]
    metrics = token_metrics(empty, empty, empty[:, 0], nothing, teacher.draft_ids)
    names = ["loss", *metrics]
    functions = (token_loss, token_metrics)
    loss, values = HeadLoss.apply(
        hidden,
        weight,
        further,
        row_weights,
        teacher,
        plan,
        functions,
        names,
        weigh,
    )
    return loss, dict(zip(names, values, strict=True))


class HeadLoss(torch.autograd.Function):
    """head_loss as one operation of autograd, whose forward pass computes the gradients as well."""

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        further,
        row_weights,
        teacher,
        plan,
        functions,
        names,
        weigh,
    ):
        token_loss, token_metrics = functions
        learns = ctx.needs_input_grad[0]  # not while evaluating
        hidden = hidden.detach()  # each row is replaced by its gradient once it has been read
        parts = [weight] if further is None else [weight, further]
        widths = [part.shape[1] for part in parts]
        grads = [None for _ in parts]  # of what is frozen
        for n, part in enumerate(parts):
            if learns and ctx.needs_input_grad[1 + n]:
                grads[n] = torch.zeros_like(part, dtype=row_weights.dtype)
        row_weights = row_weights.clone()
        most = max((stop - row for _, _, row, stop in plan.chunks), default=0)
        buffer = hidden.new_empty(most, len(weight))
        in_vocabulary = teacher.in_vocabulary()
        values = row_weights.new_empty(len(names), len(hidden))  # losses, then each metric

        for first, end, row, stop in plan.chunks:
            rows = plan.order[row:stop]
            of_row = plan.places[row:stop] - first  # its teacher among the chunk's
            p, mass, best = teacher.read(plan.teachers[first:end])
            learnable = in_vocabulary[best[of_row]]
            columns = hidden[rows].split(widths, dim=1)
            logits = torch.mm(columns[0], weight.T, out=buffer[: stop - row])
            if further is not None:
                logits.addmm_(columns[1], further.T)
            found = compare(
                logits,
                p,
                mass,
                best,
                of_row,
                teacher.draft_ids,
                token_loss,
                token_metrics,
                learns,
            )
            found[0] = torch.where(learnable, found[0], 0.0)
            values[:, rows] = torch.stack(found)
            if weigh:
                row_weights[rows] *= weigh(dict(zip(names, found, strict=True)), row)
            if not learns:
                continue
            scale = row_weights[rows] * learnable  # logits hold their gradient now
            scale = scale[:, None].to(hidden.dtype)
            hidden_grads = [(logits @ part).mul_(scale) for part in parts]
            hidden[rows] = torch.cat(hidden_grads, dim=1) if len(parts) > 1 else hidden_grads[0]
            for grad, x in zip(grads, columns, strict=True):
                if grad is not None:
                    add_product(grad, logits.T, x.mul_(scale))

        ctx.grads = (hidden, *grads)
        ctx.mark_non_differentiable(values)
        return (values[0] * row_weights).sum(), values

    @staticmethod
    def backward(ctx, grad, _):
        hidden, *weights = ctx.grads
        ctx.grads = None  # or autograd would copy what is still referred to here
        weights = [None if w is None else w.mul_(grad).to(hidden.dtype) for w in weights]
        weights += [None] * (2 - len(weights))
        return hidden.mul_(grad), *weights, None, None, None, None, None, None


def compare(
    logits,  # [n, Vd]
    p,  # [m, Vd] of the chunk's teachers, as Teacher.read gives them
    mass,  # [m]
    best,  # [m]
    of_row,  # [n]: the teacher of each row
    draft_ids,
    token_loss,
    token_metrics,
    learns,
):
    """Token losses and metrics of a chunk, [[n], ...]; with `learns` the logits become the losses' gradients."""
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
        values = [loss.detach(), *metrics.values()]
        pieces.append([value.to(p.dtype) for value in values])
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)]


def best_columns(hidden, weight):
    """The argmax [N] over the draft vocabulary of each row of hidden [N, H]; few logits exist at a time."""
    best = [(rows @ weight.T).argmax(dim=-1) for rows in hidden.split(slots.HEAD_ROWS)]
    return torch.cat(best)


def add_product(total, a, b):
    """total += a @ b, added up in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def sums_of_steps(values, counts):
    """Sums [K] in float64 of values [R]: counts[0] rows of step 0, then counts[1] of step 1, and so on."""
    parts = values.split(counts)
    return torch.stack([part.double().sum() for part in parts])
