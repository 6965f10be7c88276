"""One side of `held`: prints what each workload holds at most, forward and in training.

usage: CHECKOUT COUNTER TRANSFORMERS

CHECKOUT: where titans_pytorch is taken from; COUNTER: the checkout whose counting is used; TRANSFORMERS: workloads of
`transformer` by name, as JSON
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = dict(heads=4, batch_size=16)
ORTHOGONAL: dict[str, Any] = dict(
    dim=384, dim_head=64, heads=4, chunk_size=4, batch_size=128, spectral_norm_surprises=True
)
MEMORIES: dict[str, tuple[dict[str, Any], int, int]] = {
    "dim 384, chunk 64, 1 sequence": (dict(dim=384, chunk_size=64), 1, 1024),
    "the same, 4,096 tokens": (dict(dim=384, chunk_size=64), 1, 4096),
    "dim 384, chunk 64, 2 sequences": (dict(dim=384, chunk_size=64), 2, 1024),
    "dim 384, chunk 64, renewed every 64, 1 sequence": (dict(dim=384, chunk_size=64, batch_size=64), 1, 1024),
    "the same, 2 sequences": (dict(dim=384, chunk_size=64, batch_size=64), 2, 1024),
    "dim 384, chunk 16, renewed every 16, 2 sequences": (dict(dim=384, chunk_size=16, batch_size=16), 2, 1024),
    "16 rows, d 32, h 128, chunk 8, renewed every 16": (SMALL | dict(dim=128, dim_head=32, chunk_size=8), 4, 1024),
    "8 rows, d 64, h 256, chunk 16, renewed every 16": (SMALL | dict(dim=256, dim_head=64, chunk_size=16), 2, 1024),
    "16 rows, d 64, h 256, chunk 4, renewed every 128, spectral norm, 512 tokens": (ORTHOGONAL, 4, 512),
}
"""Arguments of `NeuralMemory`, sequences, tokens"""


def calls(transformers: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Each workload, forward without gradients and in training."""
    import torch
    from transformer_worker import build

    import titans_pytorch
    from titans_pytorch import NeuralMemory

    def both(module: Any, loss: Callable[[], Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
        def forward() -> None:
            with torch.no_grad():
                loss()

        def training() -> None:
            loss().backward()
            module.zero_grad()

        return forward, training

    for name, (arguments, sequences, tokens) in MEMORIES.items():
        torch.manual_seed(0)
        memory, seq = NeuralMemory(**arguments), torch.randn(sequences, tokens, arguments["dim"])
        yield name, *both(memory, partial(loss_of, memory, seq))
    for name, workload in transformers.items():
        model = build(titans_pytorch, workload)
        ids = torch.randint(0, workload["kwargs"]["num_tokens"], (workload["batch"], workload["tokens"] + 1))
        yield name, *both(model, partial(model, ids, return_loss=True))


def loss_of(memory: Any, seq: Any) -> Any:
    return memory(seq)[0].square().mean()


def counter(checkout: Path) -> Callable[[Callable[[], Any]], int]:
    """`held_bytes` of a checkout, whatever else is imported."""
    spec = importlib.util.spec_from_file_location("counting", checkout / "benchmarks" / "operations.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"COUNTER must be a checkout with benchmarks/operations.py in it, got {checkout}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[Callable[[], Any]], int] = module.held_bytes
    return found


def main() -> None:
    checkout, counting = map(Path, sys.argv[1:3])
    sys.path.insert(0, str(checkout))
    sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out
    import titans_pytorch

    if not Path(titans_pytorch.__file__).is_relative_to(checkout):
        raise SystemExit(f"{checkout} must be a checkout with titans_pytorch in it, got {titans_pytorch.__file__}")
    held_bytes = counter(counting)
    workloads = calls(json.loads(sys.argv[3]))
    print(json.dumps({name: [held_bytes(forward), held_bytes(training)] for name, forward, training in workloads}))


if __name__ == "__main__":
    main()
