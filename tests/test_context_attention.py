"""ImplicitMLPAttention and NestedAttention: causal, and pieces equal the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from titans_pytorch import audit
from titans_pytorch.implicit_mlp_attention import ImplicitMLPAttention
from titans_pytorch.nested_attention import NestedAttention

DIM = 8
MODULES = {
    "implicit": lambda: ImplicitMLPAttention(DIM, (4, 6, 4), heads=2),
    "implicit, one layer": lambda: ImplicitMLPAttention(DIM, (4, 4), heads=2),
    "implicit, plain": lambda: ImplicitMLPAttention(
        DIM, (5, 3, 8), heads=3, talking_heads=False, prenorm=False, keys_rmsnorm=False, activation=nn.ReLU()
    ),
    "nested": lambda: NestedAttention(DIM, dim_head=4, heads=2),
    "nested, plain": lambda: NestedAttention(DIM, dim_head=4, heads=2, prenorm=False, keys_rmsnorm=False),
}


def stream(attention: nn.Module, piece: Tensor, cache: Any) -> tuple[Tensor, Any]:
    return attention(piece, cache=cache, return_kv_cache=True)


@pytest.mark.parametrize("name", MODULES)
def test_audit(name: str) -> None:
    report = audit(MODULES[name](), torch.randn(2, 13, DIM), stream=stream, poison=False)
    report.check()
    assert report["pieces"].value < 1e-12


@pytest.mark.parametrize("name", MODULES)
def test_gradients_flow_through_the_cache(name: str) -> None:
    attention = MODULES[name]().double()
    seq = torch.randn(2, 7, DIM, dtype=torch.float64, requires_grad=True)
    probe = torch.randn_like(seq)
    (whole,) = torch.autograd.grad((attention(seq) * probe).sum(), seq)
    first, cache = stream(attention, seq[:, :3], None)
    second, _ = stream(attention, seq[:, 3:], cache)
    (pieces,) = torch.autograd.grad((torch.cat((first, second), dim=1) * probe).sum(), seq)
    assert_close(pieces, whole)


@pytest.mark.parametrize("build", [ImplicitMLPAttention, NestedAttention])
def test_norms_of_keys_can_be_turned_off(build: Any) -> None:
    args = ((4, 6, 4),) if build is ImplicitMLPAttention else ()
    torch.manual_seed(0)
    attention = build(DIM, *args, heads=2, keys_rmsnorm=False).double()
    assert not any("key_norm" in name for name, _ in attention.named_parameters())
    seq = torch.randn(1, 5, DIM, dtype=torch.float64)
    before = attention(seq)
    with torch.no_grad():
        (attention.keys[0] if build is ImplicitMLPAttention else attention.to_keys).weight.mul_(3)
    assert not torch.allclose(attention(seq), before)


@pytest.mark.parametrize(
    "build, error, words",
    [
        (lambda: ImplicitMLPAttention(DIM, (4,)), ValueError, "mlp_hiddens must have at least two widths"),
        (lambda: ImplicitMLPAttention(DIM, 4), TypeError, "mlp_hiddens must be a sequence"),
        (lambda: ImplicitMLPAttention(DIM, (4, 0)), ValueError, r"mlp_hiddens\[1\] must be positive"),
        (lambda: ImplicitMLPAttention(DIM, (4, 4), heads=0), ValueError, "heads must be positive"),
        (lambda: NestedAttention(0), ValueError, "dim must be positive"),
        (lambda: NestedAttention(DIM, dim_head=5), ValueError, "dim_head must be even"),
    ],
)
def test_refuses_wrong_arguments(build: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build()


@pytest.mark.parametrize("name", ["implicit", "nested"])
def test_refuses_wrong_inputs(name: str) -> None:
    attention, seq = MODULES[name](), torch.randn(2, 3, DIM)
    _, cache = stream(attention, seq, None)
    for wrong in (seq[0], seq[..., :2], seq[:, :0]):
        with pytest.raises(ValueError, match="tokens must"):
            attention(wrong)
    with pytest.raises(TypeError, match="cache must be what an earlier call returned"):
        attention(seq, cache=tuple(cache))
    with pytest.raises(ValueError, match="must have the shape"):
        attention(seq[:1], cache=cache)
