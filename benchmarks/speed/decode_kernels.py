"""What one decoded token of the README's transformer asks of a device: operations, and kernels once it is compiled.

    python -m benchmarks.speed.decode_kernels

A cached token of `MemoryAsContextTransformer(num_tokens=256, dim=256, depth=2, segment_len=128, ...)` behind 40 others,
random weights and ids from seed 0. Compiled by inductor as one graph of this one position; what its code calls is
counted: kernels that it has generated, and calls of libraries (products, attention). The table goes to
docs/benchmarks.md. Compiling takes half a minute on a quiet core.
"""

from __future__ import annotations

import re
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import DOCS, describe_machine
from benchmarks.operations import operations
from benchmarks.pages import markdown, put, without_options
from titans_pytorch import MemoryAsContextTransformer

MODEL: dict[str, Any] = dict(
    num_tokens=256, dim=256, depth=2, segment_len=128, num_persist_mem_tokens=4, num_longterm_mem_tokens=16
)
BEHIND = 40  # tokens
KERNEL, LIBRARY = re.compile(r"^ +cpp_fused\w*\(", re.M), re.compile(r"\b(?:extern_kernels|torch\.ops)\.[\w.]+\(")


def calls(code: str) -> tuple[int, int]:
    """How many generated kernels a compiled graph runs, and calls of libraries.  code: as inductor writes it"""
    body = code[code.index("def call") :]
    return len(KERNEL.findall(body)), len(LIBRARY.findall(body))


@torch.no_grad()
def main() -> None:
    without_options(__doc__)
    from torch._inductor.utils import run_and_get_code

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, ids = MemoryAsContextTransformer(**MODEL).eval(), torch.randint(256, (1, BEHIND + 1))
    behind, token = ids[:, :BEHIND], ids[:, BEHIND:]
    _, state = model.logits_and_state(behind)

    def step(token: Tensor) -> tuple[Tensor, Any]:
        return model.logits_and_state(token, state)

    began = time.perf_counter()
    compiled = torch.compile(step, fullgraph=True)
    (logits, _), codes = run_and_get_code(compiled, token)
    seconds = time.perf_counter() - began
    apart = float((logits - step(token)[0]).abs().max())
    kernels, libraries = (sum(each) for each in zip(*map(calls, codes), strict=True))
    rows = [["operations, eager", "kernels, compiled", "calls of libraries", "compiling, s", "logits apart, at most"]]
    found = [operations(lambda: step(token)), kernels, libraries, f"{seconds:.0f}", f"{apart:.1e}"]
    rows.append([str(each) for each in found])
    machine = describe_machine()
    told = f"{machine['cpu']}, 1 thread, {machine['date']}, commit {machine['commit']}, torch {torch.__version__}."
    put(DOCS / "benchmarks.md", "decode kernels", f"{told}\n\n{markdown(rows)}")
    print(markdown(rows))


if __name__ == "__main__":
    main()
