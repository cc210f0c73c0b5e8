"""A linear layer and the cross-entropy of its logits as one op: the public function, its torch op, its gradient, who can serve it."""

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from fastattn import backend

OP = "linear_cross_entropy"
stock_log_softmax = torch.log_softmax  # bound at import, since fastattn.enable() puts ours there


def linear_cross_entropy(
    hidden, weight, targets, *, bias=None, ignore_index=-100, reduction="mean", softcap=0.0
):
    """cross_entropy(softcap * tanh(z / softcap), targets) of z = hidden @ weight.T + bias, whose (..., V) logits are never stored.

    hidden (..., C); weight (V, C) and bias (V,), cast to hidden's dtype for the products; targets (...), int32 or int64, where
    ignore_index does not count. Logits are as torch's linear gives them in hidden's dtype (autocast's under autocast), a chunk
    of tokens at a time; the loss is fp32 (float64 for such inputs), as are the sums over chunks. softcap 0 is none.

    reduction: "mean" over the targets that count, "sum", or "none" for a loss each. Where no target counts the mean is 0 with
    gradients 0; torch's is NaN. Where gradients are wanted, forward leaves those of hidden, weight and bias, which backward
    only scales; "none" computes the logits again in backward. Raises ValueError, TypeError or IndexError naming the argument;
    targets on a GPU are checked under backend.debug.
    """
    backend.need_tensors("linear_cross_entropy", hidden=hidden, weight=weight, targets=targets)
    device = hidden.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and hidden.dtype in backend.TRITON_DTYPES:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    _check(hidden, weight, targets, bias, ignore_index, reduction, softcap)
    options = int(ignore_index), reduction, float(softcap)
    chosen = backend.choose(OP, WHY_NOT, hidden, weight, bias, targets)
    if chosen == "torch" and not _is_plain(hidden, weight, bias, targets):
        return _composite(hidden, weight, bias, targets, *options)
    # a view wherever strides allow; of (B, T, C) cut along T a copy, which is small beside the logits
    operands = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets.reshape(-1))
    if backend.needs_grad(hidden, weight, bias):
        if torch.compiler.is_compiling():
            operands = backend.distinct(*operands)
        loss = _LinearCrossEntropy.apply(*operands, *options, chosen)
    else:
        losses = _run(chosen, *operands, None, options[0], options[2], False, False, False)[0]
        loss = _reduced(losses, operands[3], *options[:2])[0]
    return loss.view(targets.shape) if reduction == "none" else loss


def _check(hidden, weight, targets, bias, ignore_index, reduction, softcap):
    name = "linear_cross_entropy"
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"{name}: hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}, need (..., C) and (V, C)"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name}: targets is {tuple(targets.shape)}, needs hidden's leading dims {tuple(hidden.shape[:-1])}"
        )
    V = weight.shape[0]
    if bias is not None and bias.shape != (V,):
        raise ValueError(f"{name}: bias is {tuple(bias.shape)}, needs ({V},), a value for each row of weight")
    for what, t in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if t is not None and not t.is_floating_point():
            raise TypeError(f"{name}: {what} is {t.dtype}, needs a floating dtype")
        if t is not None and t.device != hidden.device:
            raise ValueError(f"{name}: {what} is on {t.device}, hidden is on {hidden.device}")
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: targets is {targets.dtype}, needs int32 or int64")
    if targets.device != hidden.device:
        raise ValueError(f"{name}: targets is on {targets.device}, hidden is on {hidden.device}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{name}: reduction is {reduction!r}, needs "mean", "sum" or "none"')
    if not 0.0 <= softcap < float("inf"):
        raise ValueError(f"{name}: softcap is {softcap}, needs a finite number >= 0 (0 is off)")
    if backend.readable(targets):
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= V))]
        if wrong.numel():
            raise IndexError(
                f"{name}: targets has {int(wrong[0])}, needs 0 .. {V - 1} or ignore_index {ignore_index}"
            )


def _is_plain(*tensors):
    """Whether stock torch may go chunk by chunk, writing in place: transforms and tensor subclasses need one expression."""
    if torch.compiler.is_compiling():
        return True
    transforms = torch._C._functorch.peek_interpreter_stack() is not None
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    plain = all(t is None or type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)
    return plain and not transforms and not forward_mode


def linear_cross_entropy_fwd(*args):
    """Backend "torch": the chunks in stock ops. A launcher, so that a compiled graph holds one op and not its loop."""
    from fastattn.kernels.chunks import over_chunks  # nothing of kernels is loaded before it is used

    return over_chunks(_stock_rows, *args)


def _stock_rows(logits, targets, dloss, losses, ignore_index, softcap, grad):
    """What linear_cross_entropy_rows_kernel does, in stock ops."""
    z = logits.to(losses.dtype)
    t = torch.tanh(z / softcap) if softcap else None
    logp = stock_log_softmax(z if t is None else t * softcap, -1)
    counts = targets != ignore_index
    at = targets.long().masked_fill(~counts, 0)[:, None]
    losses.copy_(-logp.gather(1, at)[:, 0].masked_fill(~counts, 0.0))
    if grad:
        dz = logp.exp_()
        dz.scatter_add_(1, at, dz.new_full((), -1.0).expand(at.shape))
        if t is not None:
            dz *= 1 - t * t
        if dloss is not None:
            dz *= dloss[:, None]
        logits.copy_(dz.masked_fill_(~counts[:, None], 0.0))


def _reduced(losses, targets, ignore_index, reduction):
    """The loss, and the factor (1,) of every token's share in it."""
    if reduction == "none":
        return losses, None
    if reduction == "sum":
        return losses.sum(), losses.new_ones(1)
    factor = 1.0 / (targets != ignore_index).sum().clamp(min=1).to(losses.dtype)
    return losses.sum() * factor, factor.view(1)


def _composite(hidden, weight, bias, targets, ignore_index, reduction, softcap):
    """The whole expression in stock ops, logits and all: differentiable as often as one likes."""
    bias = None if bias is None else bias.to(hidden.dtype)
    z = F.linear(hidden, weight.to(hidden.dtype), bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    z = softcap * torch.tanh(z / softcap) if softcap else z
    losses = F.cross_entropy(
        z.flatten(0, -2), targets.flatten().long(), ignore_index=ignore_index, reduction="none"
    )
    loss = _reduced(losses, targets, ignore_index, reduction)[0]
    return loss.view(targets.shape) if reduction == "none" else loss


def _run(chosen, *args):
    return backend.run("linear_cross_entropy_fwd", chosen, OP, *args)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, ignore_index, reduction, softcap, chosen):
        wanted = [needed and reduction != "none" for needed in ctx.needs_input_grad[:3]]
        losses, *grads = _run(chosen, hidden, weight, bias, targets, None, ignore_index, softcap, *wanted)
        loss, factor = _reduced(losses, targets, ignore_index, reduction)
        ctx.save_for_backward(hidden, weight, bias, targets, factor, *grads)
        ctx.options = ignore_index, reduction, softcap
        ctx.chosen = chosen
        return loss

    @staticmethod
    def backward(ctx, dloss):
        hidden, weight, bias, targets, factor, *grads = ctx.saved_tensors
        ignore_index, reduction, softcap = ctx.options
        wanted = ctx.needs_input_grad[:3]
        if backend.wants_double_backward():
            inputs = (hidden, weight, bias, targets, ignore_index, reduction, softcap)
            return *backend.composite_backward(_composite, inputs, (dloss,)), None
        if reduction == "none":
            dloss = dloss.contiguous()  # (M,), and expanded where it comes from a sum
            grads = _run(ctx.chosen, hidden, weight, bias, targets, dloss, ignore_index, softcap, *wanted)[1:]
        else:
            # Not in place: a second backward through a kept graph must find them as they are. The factor has a dim, so that
            # 16-bit gradients widen before they are multiplied.
            grads = [g * (dloss * factor) for g in grads]
        inputs = (hidden, weight, bias)
        grads = (g.to(t.dtype) if w else None for g, t, w in zip(grads, inputs, wanted, strict=True))
        return *grads, *(None,) * 5


def _fake(
    hidden, weight, bias, targets, dloss, ignore_index, softcap, hidden_grad, weight_grad, bias_grad, backend
):
    (M, C), V = hidden.shape, weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty(M, dtype=wide),
        hidden.new_empty((M, C) if hidden_grad else 0),
        hidden.new_empty((V, C) if weight_grad else 0, dtype=wide),
        hidden.new_empty(V if bias_grad else 0, dtype=wide),
    )


backend.define(
    OP,
    "linear_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? dloss, int ignore_index,"
    " float softcap, bool hidden_grad, bool weight_grad, bool bias_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)


@register_flop_formula(torch.ops.fastattn.linear_cross_entropy_fwd)
def _flops(
    hidden, weight, bias, targets, dloss, index, softcap, hidden_grad, weight_grad, *_, out_shape=None, **__
):
    """The products: of the logits, and of either gradient."""
    return 2 * hidden[0] * hidden[1] * weight[0] * (1 + hidden_grad + weight_grad)


WHY_NOT = {"triton": backend.triton_why_not}
