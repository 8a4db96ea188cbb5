"""Products by oneDNN equal torch's, forward and backward."""
import pytest
import torch

from common.fast_linear import Linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k,n", [(48, 33), (33, 48)])
def test_products_by_onednn_are_torchs(k, n, bias):
    ours = Linear(k, n, bias=bias)
    theirs = torch.nn.Linear(k, n, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x, g, found = torch.randn(2, 7, k), torch.randn(2, 7, n), []
    for layer in (ours, theirs):
        at = x.clone().requires_grad_()
        y = layer(at)
        y.backward(g)
        found.append([y, at.grad, *(p.grad for p in layer.parameters())])
    assert (type(found[0][0].grad_fn).__name__ == "OneDNNBackward") == torch.backends.mkl.is_available()
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
