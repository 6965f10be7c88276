"""Train a Titans model with the Trainer of transformers, on the bytes of a text; a minute on a CPU.

    pip install -e '.[examples,hf]' && python examples/train_with_transformers.py --data FILE

Paragraphs of different lengths are padded, on the side that is asked for, and leave no trace of that. A run that was
stopped goes on with --resume. Without --data it takes what every machine has, Python's own source text.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from titans_pytorch.hf import PaddingCollator, TitansModelConfig, byte_tokenizer
from titans_pytorch.training.data import corpus


class Paragraphs(Dataset[dict[str, Tensor]]):
    """Stretches of a text that end where a line does, and so are of different lengths."""

    def __init__(self, text: bytes, longest: int, count: int) -> None:
        self.stretches: list[str] = []
        start = 0
        while start < len(text) and len(self.stretches) < count:
            end = text.rfind(b"\n", start, start + longest) + 1 or start + longest
            self.stretches.append(text[start:end].decode("utf-8", errors="ignore"))
            start = end
        self.tokenizer = byte_tokenizer()

    def __len__(self) -> int:
        return len(self.stretches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.tokenizer(self.stretches[index] + self.tokenizer.eos_token)["input_ids"]
        return {"input_ids": torch.tensor(ids)}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="python", help="a text file, or python: its own source text")
    parser.add_argument("--folder", type=Path, default=Path("runs/transformers"), help="checkpoints and the model")
    parser.add_argument("--variant", default="mag", choices=["mac", "mag", "mal", "lmm"])
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=256, help="bytes of a paragraph, at most")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--padding", default="right", choices=["left", "right"])
    parser.add_argument("--checkpointing", action="store_true", help="compute layers again in the backward pass")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    return parser.parse_args()


def main() -> None:
    given = parsed()
    set_seed(0)
    tokenizer = byte_tokenizer(padding_side=given.padding)
    text = corpus(given.data, given.folder)
    config = TitansModelConfig(
        variant=given.variant,
        vocab_size=len(tokenizer),
        hidden_size=given.dim,
        num_hidden_layers=given.depth,
        window=64,
        memory_chunk=16,
        memory_refresh=32,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    arguments = TrainingArguments(
        output_dir=str(given.folder),
        max_steps=given.steps,
        per_device_train_batch_size=given.batch,
        per_device_eval_batch_size=given.batch,
        learning_rate=given.lr,
        lr_scheduler_type="cosine",
        warmup_steps=given.steps // 10,
        logging_steps=max(1, given.steps // 10),
        save_steps=max(1, given.steps // 3),
        save_total_limit=2,
        activation_checkpointing=given.checkpointing,
        report_to="none",
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=PaddingCollator(tokenizer),
        train_dataset=Paragraphs(bytes(text.train[: 40 * given.sequence * given.batch]), given.sequence, 10_000),
        eval_dataset=Paragraphs(bytes(text.valid[: 40 * given.sequence]), given.sequence, 32),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=given.resume)
    bits = trainer.evaluate()["eval_loss"] / math.log(2)
    trainer.save_model(str(given.folder / "model"))
    print(f"{bits:.3f} bits a byte on text that it has not seen; the model is in {given.folder / 'model'}")
    prompt = tokenizer("def ", return_tensors="pt", return_token_type_ids=False).to(model.device)
    tokens = model.eval().generate(**prompt, max_new_tokens=60, do_sample=True, top_p=0.9)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
