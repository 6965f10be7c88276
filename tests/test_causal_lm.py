"""The shell under all language models: one loss in at least float32, one way to go on, one decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.support import mac_configurations, titans_configurations
from titans_pytorch import causal_lm
from titans_pytorch.attention_transformer import AttentionTransformer
from titans_pytorch.causal_lm import CausalLM, next_token_loss
from titans_pytorch.sampling import min_p_filter

NUM_TOKENS = 11


def attention_transformer() -> AttentionTransformer:
    torch.manual_seed(0)
    return AttentionTransformer(num_tokens=NUM_TOKENS, dim=8, depth=2, attention="nested", heads=2, dim_head=4).double()


MODELS: dict[str, Any] = {
    "published": lambda: mac_configurations.build(num_longterm_mem_tokens=1),
    "paper": lambda: titans_configurations.build("mac"),
    "attention": attention_transformer,
}


def random_ids(batch: int, count: int) -> Tensor:
    return torch.randint(0, NUM_TOKENS, (batch, count), generator=torch.Generator().manual_seed(0))


def test_the_loss_of_half_precision_is_taken_in_float32() -> None:
    logits, ids = torch.randn(2, 5, NUM_TOKENS, dtype=torch.bfloat16), random_ids(2, 6)
    loss = next_token_loss(logits, ids)
    assert loss.dtype == torch.float32
    assert_close(loss, -logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).mean())


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_logits_go_on_from_a_state(name: str) -> None:
    model, ids = MODELS[name](), random_ids(2, 13)
    logits, _ = model.logits_and_state(ids)
    assert_close(model.loss(ids), next_token_loss(logits[:, :-1], ids))
    first, state = model.loss_and_state(ids[:, :6])
    assert_close((first * 5 + model.loss(ids[:, 5:], state) * 7) / 12, model.loss(ids))
    with pytest.raises(ValueError, match="ids must be from 0 to 10"):
        model.loss(ids + NUM_TOKENS)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("uses_state", [True, False])
def test_a_decoder_says_what_comes_next(name: str, uses_state: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_lm, "PREFILL_TOKENS", 3)
    model, ids = MODELS[name](), random_ids(2, 9)
    with torch.no_grad():
        logits, _ = model.logits_and_state(ids)
        _, state = model.logits_and_state(ids[:, :2])
        decoder = model.decoder(state, uses_state=uses_state)
        assert_close(decoder(ids[:, 2:8]), logits[:, 7])
        assert_close(decoder(ids[:, 8:]), logits[:, 8])


def test_any_of_them_continues_a_prompt() -> None:
    model, prompt = attention_transformer(), random_ids(2, 4)
    assert isinstance(model, CausalLM)
    how = dict(temperature=0.0, filter_fn=min_p_filter)
    with torch.no_grad():
        tokens = model.continued(prompt, 9, None, uses_state=True, **how)
        assert torch.equal(tokens, model.continued(prompt, 9, None, uses_state=False, **how))
    assert tokens.shape == (2, 5)
