"""Golden vectors of the published package: every `mac_*` file, logits, loss, gradients and greedy samples."""

from __future__ import annotations

import pytest
import torch

from tests.support import golden
from titans_pytorch.mac_transformer import MemoryAsContextTransformer

published_frequencies = golden.published_frequencies


@pytest.mark.usefixtures("published_frequencies")
@pytest.mark.parametrize("name", golden.names("mac_"))
def test_equals_the_published_package(name: str) -> None:
    file = golden.load(name)
    model = MemoryAsContextTransformer(**file.kwargs).double()
    model.load_state_dict(file.state)
    ids = file.inputs["ids"]

    loss = model(ids, return_loss=True)
    loss.backward()
    got = {"logits": model(ids), "loss": loss}
    if "prompt" in file.call:
        fixed = dict(temperature=0.0, show_progress=False)
        got["sample"] = model.sample(ids[:, : file.call["prompt"]], file.call["sample"], **fixed)
        assert torch.equal(got.pop("sample"), file.outputs.pop("sample"))
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    assert max(golden.output_errors(file, got).values()) < 1e-10
    assert max(golden.gradient_errors(file, grads, floor=1e-3).values()) < 1e-9
    assert grads.keys() == file.grads.keys()
