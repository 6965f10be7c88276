"""All four models equal their equations, written token by token: outputs and the gradient of every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.support.reference import Reference
from tests.support.titans_configurations import CASES, build_backbone, random_inputs

TOKENS = 9  # no multiple of any window


def compare(variant: str, name: str, seed: int = 0, **changes: Any) -> None:
    model = build_backbone(variant, name, seed=seed, **changes)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    x = random_inputs(2, TOKENS, seed).requires_grad_()
    reference = Reference(variant, model.config, dict(model.named_parameters()))(x)
    outputs, _ = model(x)
    assert_close(outputs, reference, rtol=1e-9, atol=1e-9)
    probe = torch.randn(outputs.shape, dtype=outputs.dtype, generator=torch.Generator().manual_seed(1))
    inputs = [x, *trained.values()]
    got, expected = (torch.autograd.grad((out * probe).sum(), inputs) for out in (outputs, reference))
    for label, left, right in zip(["x", *trained], got, expected, strict=True):
        assert_close(left, right, rtol=1e-7, atol=1e-9, msg=lambda m, label=label: f"{label}: {m}")
        assert left.abs().max() > 0, label


@pytest.mark.parametrize("variant, name", CASES)
def test_outputs_and_gradients(variant: str, name: str) -> None:
    compare(variant, name)
