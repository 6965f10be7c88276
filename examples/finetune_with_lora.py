"""Adapt a Titans model to a text by low-rank adapters of peft: a few percent of its weights; a minute on a CPU.

    pip install -e '.[examples,hf]' peft && python examples/train_with_transformers.py
    python examples/finetune_with_lora.py runs/transformers/model --data FILE --parts attention memory

Parts: attention, memory (how it is written and read), gates (how fast it learns and forgets), feed_forward.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from titans_pytorch.hf import PaddingCollator, lora_targets

PARTS = ["attention", "memory", "gates", "feed_forward"]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder, as of examples/train_with_transformers.py")
    parser.add_argument("--data", type=Path, required=True, help="a text file")
    parser.add_argument("--folder", type=Path, default=Path("runs/adapted"), help="where the adapter goes")
    parser.add_argument("--parts", nargs="+", default=["attention", "memory"], choices=PARTS)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3e-3)
    return parser.parse_args()


def main() -> None:
    given = parsed()
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    base = AutoModelForCausalLM.from_pretrained(given.model)
    targets = lora_targets(base, *given.parts)
    if not targets:
        raise SystemExit(f"--parts must name parts that this model has, got {' '.join(given.parts)}")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=given.rank, target_modules=targets))
    trainable, total = model.get_nb_trainable_parameters()
    print(f"{trainable:,} of {total:,} weights are trained, in {len(targets)} layers")

    ids = tokenizer(given.data.read_text(encoding="utf-8"))["input_ids"]
    stretches = [ids[start : start + given.sequence] for start in range(0, len(ids), given.sequence)]
    held_out = max(1, len(stretches) // 10)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(given.folder),
            max_steps=given.steps,
            per_device_train_batch_size=given.batch,
            learning_rate=given.lr,
            logging_steps=max(1, given.steps // 5),
            save_strategy="no",
            report_to="none",
        ),
        data_collator=PaddingCollator(tokenizer),
        train_dataset=[{"input_ids": stretch} for stretch in stretches[held_out:]],
        eval_dataset=[{"input_ids": stretch} for stretch in stretches[:held_out]],
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"] / math.log(2)
    trainer.train()
    after = trainer.evaluate()["eval_loss"] / math.log(2)
    model.save_pretrained(given.folder)
    print(f"from {before:.3f} to {after:.3f} bits a byte on the part that was held out; adapter in {given.folder}")

    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(given.model), given.folder)
    merged = merged.merge_and_unload()  # a model as it was before, of as many weights
    prompt = torch.tensor([stretches[0][:16]])
    tokens = merged.generate(prompt, max_new_tokens=60, do_sample=True, top_p=0.9)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
