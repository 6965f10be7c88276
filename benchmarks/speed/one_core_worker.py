"""One side of `one_core`: builds everything from a checkout, and times one call for every line that it reads.

A line is `workload|mode`; the answer is the CPU time of the call. `shares|workload|mode` answers with the seconds that
its products take alone, and its passes over tensors as large as one layer of all memories; `file` with where the
library lies.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEMORIES: dict[str, tuple[dict[str, Any], int]] = {
    "a": (dict(dim=128, heads=4, dim_head=32, chunk_size=8, batch_size=16, default_step_transform_max_lr=0.1), 4),
    "b": (dict(dim=256, heads=4, dim_head=64, chunk_size=16, batch_size=16, default_step_transform_max_lr=0.1), 2),
    "wide": (dict(dim=384, chunk_size=64, batch_size=64), 2),
}
MODELS: dict[str, dict[str, Any]] = {
    "mag": {},
    "mag, one block of four": dict(memory_layers=(3,)),
    "mag, no memory": dict(memory=False),
}
TOKENS, SEQUENCES = 1024, 4


def calls(workload: str, is_compiled: bool) -> tuple[dict[str, Callable[[], Any]], int]:
    """By mode, and how many elements one layer of all rows' memories has."""
    import torch

    from titans_pytorch import NeuralMemory, TitansConfig, TitansMAG

    torch.manual_seed(0)
    module: Any
    if workload in MODELS:
        config = TitansConfig(dim=128, depth=4, heads=4, window=32, **MODELS[workload])
        module, ids = TitansMAG(256, config), torch.randint(256, (SEQUENCES, TOKENS))
        rows, width = 4 * SEQUENCES, 32

        def loss() -> torch.Tensor:
            found: torch.Tensor = module.loss(ids)
            return found

    else:
        arguments, sequences = MEMORIES[workload]
        module, seq = NeuralMemory(**arguments), torch.randn(sequences, TOKENS, arguments["dim"])
        rows, width = arguments.get("heads", 1) * sequences, arguments.get("dim_head", arguments["dim"])

        def loss() -> torch.Tensor:
            found: torch.Tensor = module(seq)[0].square().mean()
            return found

    if is_compiled:
        (module.compile_loops if workload in MODELS else module.compile_loop)()

    def forward() -> None:
        with torch.no_grad():
            loss()

    def training() -> None:
        module.zero_grad(set_to_none=True)
        loss().backward()

    return dict(forward=forward, training=training), rows * width * 4 * width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.checkout))
    import torch

    torch.set_num_threads(1)
    built: dict[str, Any] = {}
    for line in sys.stdin:
        if line.rstrip("\n") == "file":
            import titans_pytorch

            print(titans_pytorch.__file__, flush=True)
            continue
        *what, workload, mode = line.rstrip("\n").split("|")
        if workload not in built:
            built[workload] = calls(workload, arguments.compile)
        by_mode, large = built[workload]
        if what:
            from benchmarks.speed.replay import shares

            products, passes = shares(by_mode[mode], large)
            print(products, passes, flush=True)
            continue
        start = time.process_time()
        by_mode[mode]()
        print(time.process_time() - start, flush=True)


if __name__ == "__main__":
    main()
