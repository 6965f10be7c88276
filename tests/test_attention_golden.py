"""Golden vectors of the published package: every `attn_*` file, outputs and gradients."""

from __future__ import annotations

import pytest

from tests.support import golden
from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.implicit_mlp_attention import ImplicitMLPAttention
from titans_pytorch.nested_attention import NestedAttention

KINDS = {kind.__name__: kind for kind in (SegmentedAttention, ImplicitMLPAttention, NestedAttention)}


published_frequencies = golden.published_frequencies


@pytest.mark.usefixtures("published_frequencies")
@pytest.mark.parametrize("name", golden.names("attn_"))
def test_equals_the_published_package(name: str) -> None:
    file = golden.load(name)
    attention = KINDS[file.kind](**file.kwargs).double()
    attention.load_state_dict(file.state)
    seq = file.inputs["seq"].clone().requires_grad_()

    out = attention(seq)
    out = out[0] if isinstance(out, tuple) else out
    (out * file.inputs["probe"]).sum().backward()
    grads = {key: p.grad for key, p in attention.named_parameters()} | {"in/seq": seq.grad}

    assert max(golden.output_errors(file, {"out": out}).values()) < 1e-12
    assert max(golden.gradient_errors(file, grads).values()) < 1e-12
    assert grads.keys() == file.grads.keys()
