"""nn.Linear by oneDNN: fp32 matrix products on a CPU by the faster of the two libraries that torch ships.

torch's default for fp32 on a CPU is MKL.  On AMD's processors MKL uses half the width of the vector units:
195 against oneDNN's 430 GFLOP/s on two Zen 5 cores.  torch ships oneDNN too, but calls it for bf16 only.
oneDNN costs a millisecond or two for each new shape, and `model.pack` keeps shapes few.

The operator is private to torch.  Where a torch does not have it, products are torch's own, and a line says
so.
"""
from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F


class OneDNN(torch.autograd.Function):
    """x w' + b in fp32 on a CPU: x (..., K), w (N, K), b (N,) or None -> (..., N)."""

    @staticmethod
    def product(a, b, bias=None):
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return OneDNN.product(x, w, b)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad
        x_rows, g_rows = x.flatten(0, -2), g.flatten(0, -2)
        grad_w = None
        if need_w and x.shape[-1] < g.shape[-1]:    # the narrow factor first is up to 1.7 times faster
            grad_w = OneDNN.product(x_rows.t(), g_rows.t()).t()
        elif need_w:
            grad_w = OneDNN.product(g_rows.t(), x_rows.t())
        grad_x = OneDNN.product(g, w.t()) if need_x else None
        return grad_x, grad_w, g_rows.sum(0) if need_b else None


@cache
def available():
    """Whether this torch has both libraries and the operator.  Where MKL is missing, oneDNN is torch's
    default already.  Prints once that the operator is gone."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    try:
        OneDNN.product(torch.ones(2, 3), torch.ones(4, 3))
    except (AttributeError, RuntimeError, TypeError):
        print(f"torch {torch.__version__} has no torch.ops.mkldnn._linear_pointwise as before: fp32 products "
              "are torch's own, on AMD's processors at half the speed", flush=True)
        return False
    return True


class Linear(nn.Linear):
    """nn.Linear, by oneDNN for fp32 on a CPU."""

    def forward(self, x):
        plain_fp32 = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
        if (plain_fp32 and available() and not torch.is_autocast_enabled("cpu")
                and not torch.compiler.is_compiling()):
            linear = OneDNN.apply if torch.is_grad_enabled() else OneDNN.product    # a few microseconds less
            return linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)
