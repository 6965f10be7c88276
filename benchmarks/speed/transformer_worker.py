"""One library in one process: builds a transformer of a workload, measures one thing, prints one line of JSON.

Imports nothing but torch, titans_pytorch and the file beside it, so that it runs in the environment of either side;
products alone are measured of this library only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))  # `python -I` leaves it out
from high_water import high_water


def build(library: Any, workload: dict[str, Any]) -> Any:
    from titans_pytorch.mac_transformer import MemoryAsContextTransformer

    torch.manual_seed(0)
    kwargs = dict(workload["kwargs"])
    if "neural_memory_model" in kwargs:
        kind, arguments = kwargs["neural_memory_model"]
        kwargs["neural_memory_model"] = getattr(library, kind)(**arguments)
    return MemoryAsContextTransformer(**kwargs)


def training_step(model: Any, workload: dict[str, Any]) -> Callable[[], float]:
    """Seconds of forward and backward."""
    ids = torch.randint(0, workload["kwargs"]["num_tokens"], (workload["batch"], workload["tokens"] + 1))

    def step() -> float:
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        model(ids, return_loss=True).backward()
        return time.perf_counter() - start

    return step


def training(model: Any, workload: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Seconds of forward and backward, and how far the first one raises the high-water mark of memory."""
    step, before = training_step(model, workload), high_water()
    seconds = [step() for _ in range(repeats + 1)]
    timed = seconds[1:] or seconds
    return {"seconds": statistics.median(timed), "all": seconds, "peak_bytes": high_water() - before}


def products(model: Any, workload: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Seconds of the products of a training step alone, the least of all repeats (only this library)."""
    from benchmarks.speed import replay

    as_in_training_scripts()
    asked, _ = replay.parts(replay.recorded(training_step(model, workload)), 0)
    return {"seconds": replay.seconds_alone(asked, repeats, time.perf_counter)}


def as_in_training_scripts() -> None:
    """Freed memory is kept, if the library's training scripts keep it."""
    try:
        from titans_pytorch.training.allocator import keep_freed_memory
    except ImportError:
        return
    keep_freed_memory()


def on_request(model: Any, workload: dict[str, Any], repeats: int) -> dict[str, Any]:
    """A training step for every line that comes in, and its seconds as a line that goes out."""
    as_in_training_scripts()
    step = training_step(model, workload)
    step()
    for _ in sys.stdin:
        print(json.dumps({"seconds": step()}), flush=True)
    return {}


def sampling(model: Any, workload: dict[str, Any], repeats: int, **how: Any) -> dict[str, Any]:
    """Milliseconds per token of cached sampling from a short prompt."""
    prompt = torch.randint(0, workload["kwargs"]["num_tokens"], (1, 4))
    milliseconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        model.sample(prompt, 4 + 64, use_cache=True, show_progress=False, **how)
        milliseconds.append(1e3 * (time.perf_counter() - start) / 64)
    return {"ms_per_token": statistics.median(milliseconds)}


def compiled(model: Any, workload: dict[str, Any], repeats: int) -> dict[str, Any]:
    """The same with compiled steps, which a first call compiles (only this library)."""
    if model.why_by_groups:
        return {"error": model.why_by_groups}
    start = time.perf_counter()
    sampling(model, workload, 1, compile=True)
    return {"first_call_seconds": time.perf_counter() - start} | sampling(model, workload, repeats, compile=True)


@torch.no_grad()
def decoding(model: Any, workload: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Milliseconds per token, and bytes of the process, behind contexts of growing length (only this library)."""
    ids = torch.randint(0, workload["kwargs"]["num_tokens"], (1, 4096))
    cache, rows = None, []
    for context in workload["contexts"]:
        while (seen := 0 if cache is None else cache.num_tokens) < context:
            _, cache = model.hidden_states(ids[:, : min(4096, context - seen)], cache)
        start = time.perf_counter()
        for i in range(128):
            hidden, cache = model.hidden_states(ids[:, i : i + 1], cache)
            model.to_logits(model.norm(hidden)).argmax(dim=-1)
        per_token = 1e3 * (time.perf_counter() - start) / 128
        rows.append({"context": context, "ms_per_token": per_token, "peak_bytes": high_water()})
    return {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "measurement", choices=["training", "products", "on_request", "sampling", "compiled", "decoding"]
    )
    parser.add_argument("workload", help="JSON")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkout", help="take titans_pytorch from this folder instead of the environment")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.checkout:
        sys.path.insert(0, arguments.checkout)
    import titans_pytorch

    workload = json.loads(arguments.workload)
    model = build(titans_pytorch, workload)
    answer = globals()[arguments.measurement](model, workload, arguments.repeats)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
