"""losses."""

import torch

from core import attention

COMPARE_ROWS = 16  # of these, compared at a time: they stay in the cache of a CPU core


def compare(logits, p, mass):
    """A draft's logits against its teacher: both [N, Vd]; p over the draft vocabulary, mass [N]: its share of all.

    Returns cross-entropy, argmax and acceptance (sum of min(p, q)), [N] each, and the first one's gradient, q - p.
    """
    best, index = logits.max(dim=-1)
    q = logits.softmax(dim=-1)
    total = best - q.gather(1, index[:, None])[:, 0].log()
    entropy = total - torch.linalg.vecdot(p, logits)
    return entropy, index, torch.minimum(p * mass[:, None], q).sum(dim=-1), q - p


class HeadLoss(torch.autograd.Function):
    """Head, softmax, soft cross-entropy and metrics chunk by chunk; gradients are formed at once, no logits kept."""

    @staticmethod
    def forward(ctx, hidden, weight, last, head, plan, known, factors):
        """hidden [R, H]: normed outputs of the plan's rows; weight [Vd, H]: the draft's head; last [T, Ht], head: the
        target's; known [Vd]: target ids of the draft vocabulary; factors [R]: the weight of each row's step.
        Returns the weighted sum of the cross-entropies and [R, 3]: cross-entropy, right, acceptance.
        """
        wide, cuda = torch.promote_types(hidden.dtype, torch.float32), hidden.device.type == "cuda"
        values = hidden.new_empty(len(hidden), 3, dtype=wide)
        draws = torch.zeros(len(head.weight), dtype=torch.bool, device=hidden.device).index_fill_(0, known, True)
        hidden = hidden.detach()  # its gradient takes its place, row by row: the caller has no use for it any more
        learns = ctx.needs_input_grad[0]  # not while evaluating
        ctx.grads = hidden, torch.zeros_like(weight, dtype=wide) if learns else None
        logits = hidden.new_empty(max((stop - row for *_, row, stop in plan.chunks), default=0), len(weight))
        work, most = (attention.compiled(compare), len(logits)) if cuda else (compare, COMPARE_ROWS)
        for first, end, row, stop in plan.chunks:
            rows, places = plan.order[row:stop], plan.places[row:stop] - first
            p, mass, best = head.teach(last[plan.teachers[first:end]], known)
            x, best = hidden[rows], best[places]
            drawn = draws[best]  # elsewhere the draft cannot be right and learns nothing
            chunk = torch.mm(x, weight.T, out=logits[: stop - row])
            for at in range(0, stop - row, most):
                part = slice(at, min(at + most, stop - row))
                of = places[part]
                entropy, index, accept, grad = work(chunk[part].to(wide), p.index_select(0, of), mass[of])
                entropy, right = torch.where(drawn[part], entropy, 0.0), known[index] == best[part]
                values[rows[part]] = torch.stack([entropy, right.to(wide), accept], dim=-1)
                chunk[part] = grad
            if learns:
                scale = (factors[rows] * drawn)[:, None].to(x.dtype)
                hidden[rows] = (chunk @ weight).mul_(scale)
                if wide == x.dtype:
                    ctx.grads[1].addmm_(chunk.T, x.mul_(scale))
                else:  # added up in fp32
                    ctx.grads[1].add_(chunk.T @ x.mul_(scale))
        ctx.mark_non_differentiable(values)
        return (values[:, 0] * factors).sum(), values

    @staticmethod
    def backward(ctx, grad, _):
        (hidden, weight), ctx.grads = ctx.grads, None  # or autograd would copy what is still referred to here
        return hidden.mul_(grad), weight.mul_(grad).to(hidden.dtype), None, None, None, None, None
