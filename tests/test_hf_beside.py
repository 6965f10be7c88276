"""A memory beside layers of a model that is already trained: unnoticed at first, later a part of it in every way."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("transformers", reason="titans_pytorch.hf needs transformers, the extra hf")

from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, LlamaConfig

from tests.support.hf_models import ids, left_padded
from titans_pytorch.hf import AddedMemory

ROOT = Path(__file__).parents[1]
COMMON: dict[str, Any] = dict(vocab_size=11, bos_token_id=1, eos_token_id=None, pad_token_id=0)
CONFIGS: dict[str, Any] = {
    "gpt2": GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=64, loss_type="ForCausalLM", **COMMON),
    "llama": LlamaConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        **COMMON,
    ),
}
OPTIONS: dict[str, Any] = dict(chunk_size=3, batch_size=6, heads=2, dim_head=8)


def base(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).double().eval().requires_grad_(False)


def memory(seed: int = 1) -> AddedMemory:
    torch.manual_seed(seed)
    return AddedMemory(16, (1, 3), OPTIONS).double()


def opened(name: str) -> tuple[Any, AddedMemory]:
    """A model beside which memories say something."""
    model, added = base(name), memory()
    for gate in added.gates:
        torch.nn.init.normal_(gate, std=3.0)
    return model, added.attach_to(model)


def said(model: Any, prompt: Tensor, **options: Any) -> Tensor:
    how: dict[str, Any] = dict(max_new_tokens=9, do_sample=False) | options
    answer: Tensor = model.generate(prompt, **how)
    return answer[:, prompt.shape[1] :]


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_changes_until_it_is_trained(name: str) -> None:
    model = base(name)
    before, generated = model(ids(2, 10)).logits, said(model, ids(2, 10))
    added = memory().attach_to(model)
    assert torch.equal(model(ids(2, 10)).logits, before)
    assert torch.equal(said(model, ids(2, 10)), generated)
    assert not any("memor" in key for key in model.state_dict())
    for gate in added.gates:
        torch.nn.init.ones_(gate)
    assert not torch.allclose(model(ids(2, 10)).logits, before)
    added.remove()
    assert torch.equal(model(ids(2, 10)).logits, before)
    assert torch.equal(said(model, ids(2, 10)), generated)


@pytest.mark.parametrize("name", CONFIGS)
def test_generating_reads_every_token_once(name: str) -> None:
    model, _ = opened(name)
    prompt = ids(2, 7)
    expected = said(model, prompt, use_cache=False)
    assert torch.equal(said(model, prompt), expected)
    assert torch.equal(said(model, prompt, num_beams=3), said(model, prompt, num_beams=3, use_cache=False))
    looked_up = ids(1, 3).repeat(1, 3)
    assert torch.equal(said(model, looked_up, prompt_lookup_num_tokens=4), said(model, looked_up, use_cache=False))
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in prompt.split([4, 1, 2], dim=1)]
    assert_close(torch.cat(pieces, dim=1), model(prompt, use_cache=False).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_is_not_remembered(name: str) -> None:
    model, _ = opened(name)
    rows = [ids(8), ids(3, seed=1)]
    batch = left_padded(rows)
    expected = torch.cat([said(model, row[None]) for row in rows])
    assert torch.equal(said(model, batch.pop("input_ids"), **batch), expected)
    positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    got = model(left_padded(rows)["input_ids"], position_ids=positions, use_cache=False, **batch).logits[1, -3:]
    assert_close(got, model(rows[1][None]).logits[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_memory_is_trained(name: str) -> None:
    model, added = base(name), memory()
    added.attach_to(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(added.parameters(), lr=2e-2)
    batch, losses = ids(3, 2).repeat(1, 8), []
    for _ in range(12):
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in added.parameters())
    assert all(torch.equal(model.state_dict()[key], weight) for key, weight in before.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_kept_apart_from_the_model(name: str, tmp_path: Path) -> None:
    model, added = opened(name)
    expected = model(ids(2, 10)).logits
    added.save_pretrained(tmp_path)
    other = base(name)
    again = AddedMemory.from_pretrained(tmp_path).attach_to(other)
    assert again.layers == (1, 3)
    assert_close(other(ids(2, 10)).logits, expected, rtol=0, atol=1e-12)


def test_layers_can_be_computed_again_in_the_backward_pass() -> None:
    gradients = []
    for is_checkpointed in (False, True):
        model, added = opened("llama")
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        model.train()
        model.get_input_embeddings().requires_grad_(True)
        model(ids(2, 10), labels=ids(2, 10), use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in added.parameters()])
    assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    model, added = opened("gpt2")
    with pytest.raises(ValueError, match="attached to one model at a time"):
        added.attach_to(base("llama"))
    with pytest.raises(ValueError, match="model must have no added memory yet"):
        memory().attach_to(model)
    with pytest.raises(ValueError, match="dim must be that of the model, 16, got 8"):
        AddedMemory(8, (1,)).attach_to(base("gpt2"))
    with pytest.raises(ValueError, match="layers must hold numbers from 1 to the depth 3, got 4"):
        AddedMemory(16, (1, 4)).attach_to(base("gpt2"))
    with pytest.raises(ValueError, match="layers must be different numbers, at least one"):
        AddedMemory(16, (2, 2))
    added.remove()
    cache = model(ids(1, 4)).past_key_values
    added.attach_to(model)
    with pytest.raises(ValueError, match="must have been read with this memory from its first token, got 5 tokens"):
        model(ids(1, 1), past_key_values=cache)


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(900)))
    command = [sys.executable, "examples/add_memory_to_a_pretrained_model.py", "--data", str(text), "--steps", "3"]
    command += ["--folder", str(tmp_path / "added"), "--sequence", "64", "--batch", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the model says what it said: True" in done.stdout
    assert "without it the model says what it said: True" in done.stdout
    assert "says the same: True" in done.stdout
