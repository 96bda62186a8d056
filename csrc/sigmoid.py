"""sigmoid_loss: the sigmoid loss over all pairs of a batch, without a tensor of all pairs.

Some rows of pairs after others: their scores are one matrix product, and become gradients; two more products take these to both sides.
So one pass gives the loss and, where they will be wanted, the gradients. On a GPU a kernel (sigmoid_cuda.cu) does what stands between
the products, and these are of bf16 where the inputs are.
"""
import torch

from . import similarity
from .similarity import full_precision

PAIRS = {"cpu": 2**18, "cuda": 2**24}            # that may be there at a time
HALF = "dtype" in torch.ops.aten.mm.overloads()  # can PyTorch return bf16 products in float32? (2.8 and newer, on a GPU)

torch.library.define("ecg::sigmoid_loss", "(Tensor x, Tensor y, Tensor both, Tensor positive, bool gradients, int first=0) -> "
                                          "(Tensor, Tensor, Tensor, Tensor)")
torch.library.define("ecg::sigmoid_terms", "(Tensor scores, int first, Tensor both, Tensor positive, ScalarType dtype) -> (Tensor, Tensor)")


def sigmoid_loss(x, y, scale=1.0, bias=0.0, positive=None, first=None):
    """Mean over all pairs of softplus(-s_ij (scale x_i.y_j + bias)), where s_ij = 1 if i = j and positive[i], else -1 (SigLIP, Zhai et al.
    2023, with its mean over the batch's rows replaced by one over all pairs; D-BETA's ETS: docs/papers.md).

    x, y (B, D): not normalised here. positive (B,) bool: which pairs belong together; all where not given. x
    may be rows of the batch only, (R, D) from row `first` on: the mean is over their pairs then. scale, bias:
    numbers, or tensors that may be learned. float32 and float64 are computed as they are, fp16 in float32, bf16
    in float32, too, or on a GPU by bf16 products added in float32. Returns a scalar, float32 or float64; gradients to all tensors, but no second ones. Errors: TypeError,
    ValueError."""
    if not (x.shape == y.shape or first is not None) or not are_rows(x, y, first or 0) or x.device != y.device:
        rows = "" if first is None else f", or x (R, D) rows of such from {first} on"
        raise ValueError(f"sigmoid_loss: x {tuple(x.shape)} on {x.device} and y {tuple(y.shape)} on {y.device}; both must be (B, D){rows}, "
                         "on one device")
    if not (x.is_floating_point() and y.is_floating_point()):
        raise TypeError(f"sigmoid_loss: x and y must be floating-point tensors, not {x.dtype} and {y.dtype}")
    if positive is None:
        positive = torch.ones(len(y), dtype=torch.bool, device=x.device)
    if positive.shape != y.shape[:1] or positive.dtype != torch.bool:
        raise ValueError(f"sigmoid_loss: positive is {positive.dtype} {tuple(positive.shape)}; it must be bool ({len(y)},)")
    if not (HALF and x.is_cuda and x.dtype == y.dtype == torch.bfloat16):
        x, y = similarity.alike(x, y)
    wide = torch.promote_types(x.dtype, torch.float32)
    both = torch.stack([torch.as_tensor(number, dtype=wide, device=x.device) for number in (scale, bias)])
    gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, y, both))
    with full_precision(x):
        return torch.ops.ecg.sigmoid_loss(x.contiguous(), y.contiguous(), both, positive.to(x.device).contiguous(), gradients,
                                          first or 0)[0]


def are_rows(x, y, first):
    """Is x (R, D) rows first to first + R of what pairs with y (B, D)?"""
    return x.dim() == y.dim() == 2 and x.shape[1] == y.shape[1] and 0 <= first <= len(y) - len(x)


def terms(scores, first, both, positive, dtype):
    """Of rows `first` and on: scores (R, B) -> gradients of their losses' sum with respect to scale * score + bias, (R, B) of dtype, and
    (3,): that sum, its gradients with respect to scale and bias."""
    if similarity.KERNELS and scores.is_cuda and scores.dtype == torch.float32:
        return torch.ops.ecg.sigmoid_terms(scores, first, both, positive, dtype)
    logits = scores * both[0] + both[1]
    losses, gradient = torch.nn.functional.softplus(logits), logits.sigmoid()
    pairs = logits.diagonal(first)
    mine = positive[first:first + len(scores)]
    losses.diagonal(first).copy_(torch.where(mine, torch.nn.functional.softplus(-pairs), losses.diagonal(first)))
    gradient.diagonal(first).copy_(torch.where(mine, -(-pairs).sigmoid(), gradient.diagonal(first)))
    return gradient.to(dtype), torch.stack([losses.sum(), (gradient * scores).sum(), gradient.sum()])


def product(x, y):
    """x @ y, of bf16 added and returned in float32."""
    return torch.mm(x, y, out_dtype=torch.float32) if x.dtype == torch.bfloat16 else torch.mm(x, y)


def loss_and_gradients(x, y, both, positive, gradients, first=0):
    size, number = len(y), max(1, len(x) * len(y))
    pairs = positive.shape == y.shape[:1] and positive.dtype == torch.bool
    if not are_rows(x, y, first) or both.shape != (2,) or not pairs:
        raise ValueError(f"sigmoid_loss: x {tuple(x.shape)}, y {tuple(y.shape)}, both {tuple(both.shape)}, "
                         f"positive {positive.dtype} {tuple(positive.shape)}; they must be (R, D), (B, D), "
                         "(2,) and bool (B,)")
    sums, of_x, of_y = both.new_zeros(3), both.new_zeros(x.shape if gradients else 0), both.new_zeros(y.shape if gradients else 0)
    rows = max(1, PAIRS[x.device.type] // max(1, size))
    for start in range(0, len(x), rows):
        some = x[start:start + rows]
        gradient, found = terms(product(some, y.T), first + start, both, positive, x.dtype)
        sums += found
        if gradients:
            of_x[start:start + rows] = product(gradient, y)
            of_y += product(gradient.T, some)
    sums = sums / number
    of_x, of_y = (tensor.mul_(both[0] / number).to(x.dtype) for tensor in (of_x, of_y))
    return sums[0].clone(), of_x, of_y, sums[1:].clone()


for device in PAIRS:
    torch.library.impl("ecg::sigmoid_loss", device, loss_and_gradients)


@torch.library.register_fake("ecg::sigmoid_loss")
def _(x, y, both, positive, gradients, first=0):
    return both.new_empty(()), x.new_empty(x.shape if gradients else 0), y.new_empty(y.shape if gradients else 0), both.new_empty(2)


def keep(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def gradients_of(ctx, grad, *_):
    of_x, of_y, of_both = ctx.saved_tensors
    return grad * of_x, grad * of_y, grad * of_both, None, None, None


torch.library.register_autograd("ecg::sigmoid_loss", gradients_of, setup_context=keep)
