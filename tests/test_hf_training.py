"""Trainer, collators and adapters take the models as they take any other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("transformers", reason="titans_pytorch.hf needs transformers, the extra hf")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate, the extra examples")

from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from tests.support.hf_models import NAMES, both, ids
from titans_pytorch import NeuralMemory
from titans_pytorch.hf import PaddingCollator, byte_tokenizer, lora_targets

ROOT = Path(__file__).parents[1]
quiet = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")  # there is no accelerator here


def rows(count: int = 12) -> list[dict[str, list[int]]]:
    """Something to learn: every row goes on repeating itself."""
    return [{"input_ids": ids(1, 2, seed=n).repeat(1, 2 + n % 3)[0].tolist()} for n in range(count)]


def trainer(model: Any, folder: Path, *, side: str = "right", collator: Any = None, **options: Any) -> Trainer:
    tokenizer = byte_tokenizer(padding_side=side)
    arguments: dict[str, Any] = dict(
        max_steps=6,
        per_device_train_batch_size=3,
        learning_rate=5e-3,
        logging_steps=1,
        save_steps=3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    return Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **arguments | options),
        data_collator=collator or PaddingCollator(tokenizer),
        train_dataset=rows(),
    )


def losses(trained: Trainer) -> list[float]:
    return [float(line["loss"]) for line in trained.state.log_history if "loss" in line]


def weights(model: Any) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@quiet
@pytest.mark.parametrize("name", ["mag", "mac transformer"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = trainer(both(name)[1], tmp_path / "whole")
    whole.train()
    again = trainer(both(name)[1], tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected, got = weights(whole.model), weights(again.model)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@quiet
@pytest.mark.parametrize("name", ["mag", "mac transformer"])
def test_the_side_of_padding_and_recomputation_change_nothing(name: str, tmp_path: Path) -> None:
    """Left padding, layers computed again, and documents in one row train as right padding does."""
    ways: list[dict[str, Any]] = [{}, dict(side="left"), dict(activation_checkpointing=True)]
    ways += [dict(collator=DataCollatorWithFlattening())]
    ways += [dict(collator=DataCollatorForLanguageModeling(byte_tokenizer(padding_side="right"), mlm=False))]
    how: dict[str, Any] = dict(max_steps=2, save_strategy="no")
    trained = [trainer(both(name)[1], tmp_path / str(n), **way | how) for n, way in enumerate(ways)]
    for each in trained:
        each.train()
    for other in trained[1:]:
        assert_close(losses(other), losses(trained[0]), rtol=1e-3, atol=1e-3)
        assert_close(weights(other.model), weights(trained[0].model), rtol=1e-3, atol=1e-3)


@quiet
def test_a_run_can_be_evaluated_by_its_answers(tmp_path: Path) -> None:
    """States are no predictions: what is scored are the logits alone."""
    tokens = {"input_ids": ids(1, 6)[0].tolist()}

    def score(predictions: Any) -> dict[str, float]:
        assert predictions.predictions.shape == (2, 6, 11)
        return {"found": 1.0}

    run = trainer(both("mag")[1], tmp_path, do_train=False)
    run.compute_metrics = score
    assert run.evaluate([tokens, tokens])["eval_found"] == 1.0


@quiet
def test_a_model_learns(tmp_path: Path) -> None:
    _, model = both("mag")
    batch = PaddingCollator(byte_tokenizer())(rows())
    before = model(**batch).loss.item()
    trainer(model, tmp_path, max_steps=20, learning_rate=1e-2, save_strategy="no").train()
    assert model(**batch).loss.item() < before - 0.3


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_token_is_predicted_but_the_first(side: str) -> None:
    batch = PaddingCollator(byte_tokenizer(padding_side=side), pad_to_multiple_of=4)(
        [{"input_ids": [7, 8, 9]}, rows()[0]]
    )
    real, labels = batch["attention_mask"].bool(), batch["labels"]
    assert batch["input_ids"].shape == (2, 4)
    assert labels[0, real[0]].tolist() == [-100, 8, 9]
    assert (labels[~real] == -100).all()
    assert bool(real[0, 0]) == (side == "right")


# ---- adapters


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_found_by_what_they_are(name: str) -> None:
    _, model = both(name)
    found = {part: lora_targets(model, part) for part in ("attention", "memory", "gates", "feed_forward")}
    assert bool(found["attention"]) == (name != "lmm")
    assert all(found[part] for part in ("memory", "gates", "feed_forward"))
    everywhere = sorted(lora_targets(model, *found))
    linear = sorted(n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head")
    others = [n for n in linear if n not in everywhere]
    assert sorted(target for targets in found.values() for target in targets) == everywhere
    assert all("axial_pos_emb" in n or "learned_v_mix" in n for n in others), others
    memories = [n for n, m in model.named_modules() if isinstance(m, NeuralMemory)]
    assert all(any(n.startswith(f"{memory}.") for memory in memories) for n in found["memory"] + found["gates"])


def test_parts_that_there_are_not_are_refused() -> None:
    _, model = both("mag")
    with pytest.raises(
        ValueError, match="parts must be one of 'attention', 'memory', 'gates', 'feed_forward', got 'mlp'"
    ):
        lora_targets(model, "mlp")
    with pytest.raises(ValueError, match="got none"):
        lora_targets(model)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("part", ["attention", "memory", "gates", "feed_forward"])
@pytest.mark.parametrize("name", ["mag", "mac transformer"])
def test_adapters_train_merge_and_come_back(name: str, part: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft")
    _, model = both(name)
    model.save_pretrained(tmp_path / "base")
    before = model(ids(2, 9)).logits
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=lora_targets(model, part))
    adapted = peft.get_peft_model(model, config)
    assert_close(adapted(ids(2, 9)).logits, before, rtol=0, atol=1e-12)  # an adapter begins as nothing
    for name_of, parameter in adapted.named_parameters():
        if "lora_B" in name_of:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    adapted(input_ids=ids(2, 9), labels=ids(2, 9)).loss.backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora" in n for n in grads)
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())
    got = adapted(ids(2, 9)).logits
    assert not torch.allclose(got, before)

    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_close(again(ids(2, 9)).logits, got, rtol=1e-5, atol=1e-5)
    assert torch.equal(again.generate(ids(1, 5), max_new_tokens=3), adapted.generate(ids(1, 5), max_new_tokens=3))
    assert_close(again.merge_and_unload()(ids(2, 9)).logits, got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mag", "mac transformer"])
def test_prompts_can_be_tuned(name: str) -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft")
    _, model = both(name)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_attention_heads=2)
    tuned = peft.get_peft_model(model, config)
    batch = ids(2, 6)
    loss = tuned(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss
    loss.backward()
    grads = [parameter.grad for parameter in tuned.parameters() if parameter.requires_grad]
    assert len(grads) == 1
    assert grads[0] is not None
    assert grads[0].abs().sum() > 0
    assert tuned.generate(input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=3).shape == (2, 9)


def test_prefixes_of_keys_and_values_are_refused() -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft")
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_attention_heads=2, token_dim=8, num_layers=2
    )
    tuned = peft.get_peft_model(both("mag")[1], config)
    with pytest.raises(TypeError, match="past_key_values must be a TitansCache"):
        tuned(input_ids=ids(2, 6), attention_mask=torch.ones(2, 6))


# ---- examples


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_examples_train_resume_and_adapt(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="adapters need peft")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(400)))
    size = ["--dim", "16", "--depth", "1", "--sequence", "40", "--batch", "2", "--steps", "6"]
    train = ["examples/train_with_transformers.py", "--data", str(text), "--folder", str(tmp_path / "run"), *size]
    assert "bits a byte" in run(*train, "--padding", "left", "--checkpointing")
    assert "bits a byte" in run(*train, "--resume")
    adapt = ["examples/finetune_with_lora.py", str(tmp_path / "run/model"), "--data", str(text), "--sequence", "40"]
    assert "weights are trained" in run(*adapt, "--folder", str(tmp_path / "adapted"), "--steps", "3", "--batch", "2")
