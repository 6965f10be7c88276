"""Put a memory beside layers of a model that is already trained, and train nothing but the memory; a minute on a CPU.

    pip install -e '.[examples,hf]' && python examples/add_memory_to_a_pretrained_model.py --data FILE
    python examples/add_memory_to_a_pretrained_model.py --model gpt2 --layers 4 8 --data FILE

Any decoder of transformers will do, by name or as a folder. Without --model a small one, shaped like GPT-2 and reading
bytes, is first trained for a moment. The memory is shut at first: the model says bit for bit what it said before.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from titans_pytorch.hf import AddedMemory, byte_tokenizer
from titans_pytorch.training.data import corpus


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name or a folder; default: a small one, trained for a moment")
    parser.add_argument("--layers", type=int, nargs="+", default=[2], help="numbers, from 1")
    parser.add_argument("--data", default="python", help="a text file, or python: its own source text")
    parser.add_argument("--folder", type=Path, default=Path("runs/added"), help="where the memory goes")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3e-3)
    return parser.parse_args()


def small_model(given: argparse.Namespace, vocabulary: int) -> Any:
    """Something to add a memory to."""
    sizes: dict[str, Any] = dict(n_embd=64, n_layer=3, n_head=4, n_positions=max(512, given.sequence))
    return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, **sizes))


def batches(ids: Tensor, given: argparse.Namespace) -> Any:
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(0, len(ids) - given.sequence, (given.batch,), generator=generator).tolist()
        yield torch.stack([ids[start : start + given.sequence] for start in starts])


def train(model: Any, parameters: Any, ids: Tensor, given: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=given.lr)
    for step, batch in zip(range(given.steps), batches(ids, given), strict=False):
        loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, given.steps // 5) == 0:
            print(f"step {step}: {loss.item() / math.log(2):.3f} bits a token", flush=True)


@torch.no_grad()
def bits(model: Any, ids: Tensor, given: argparse.Namespace) -> float:
    """Of a token that it was not trained on."""
    held_out = ids[: 8 * given.sequence].unflatten(0, (-1, given.sequence))
    return float(model(held_out, labels=held_out, use_cache=False).loss) / math.log(2)


def main() -> None:
    given = parsed()
    torch.manual_seed(0)
    text = corpus(given.data, given.folder)
    tokenizer: Any = byte_tokenizer() if given.model is None else AutoTokenizer.from_pretrained(given.model)
    encoded = [
        tokenizer(bytes(part[:200_000]).decode("utf-8", "ignore"))["input_ids"] for part in (text.train, text.valid)
    ]
    ids, held_out = map(torch.tensor, encoded)
    if given.model is None:
        model = small_model(given, len(tokenizer))
        train(model, model.parameters(), ids, given)
    else:
        model = AutoModelForCausalLM.from_pretrained(given.model)
    model.eval().requires_grad_(False)
    before, prompt = bits(model, held_out, given), held_out[None, :32]
    said = model(prompt).logits

    options = dict(chunk_size=16, batch_size=64, heads=4, dim_head=16, momentum=True)
    added = AddedMemory(model.config.get_text_config().hidden_size, given.layers, options).attach_to(model)
    print(f"the model says what it said: {torch.equal(model(prompt).logits, said)}")
    print(f"{sum(p.numel() for p in added.parameters()):,} weights are trained, {model.num_parameters():,} are not")
    train(model, added.parameters(), ids, given)
    print(f"from {before:.3f} to {bits(model, held_out, given):.3f} bits a token on text that neither has seen")

    added.save_pretrained(given.folder / "memory")
    answer = model.generate(prompt, max_new_tokens=40, do_sample=False)
    added.remove()
    print(f"without it the model says what it said: {torch.equal(model(prompt).logits, said)}")
    AddedMemory.from_pretrained(given.folder / "memory").attach_to(model)
    again = model.generate(prompt, max_new_tokens=40, do_sample=False)
    print(f"the memory from {given.folder / 'memory'} says the same: {torch.equal(again, answer)}")
    print(tokenizer.decode(answer[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
