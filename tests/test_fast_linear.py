"""Products by oneDNN equal torch's, forward and backward."""
import pytest
import torch

from common import fast_linear
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


def test_this_torch_has_the_operator():
    if torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available():
        assert fast_linear.available(), (
            f"torch {torch.__version__} has changed torch.ops.mkldnn._linear_pointwise, so fp32 products on "
            "AMD's processors run at half the speed: find the new operator for common/fast_linear.py")


def test_without_the_operator_products_are_torch_s_and_it_is_said_once(monkeypatch, capfd):
    def gone(*_):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")
    monkeypatch.setattr(fast_linear.OneDNN, "product", gone)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    fast_linear.available.cache_clear()
    layer, x = Linear(5, 3), torch.randn(4, 5)
    for _ in range(2):
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    fast_linear.available.cache_clear()
    assert capfd.readouterr().out.count("are torch's own") == 1
