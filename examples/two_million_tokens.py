"""Stream two million tokens through each of the four Titans models, on a CPU, and watch speed and memory stay flat.

    python examples/two_million_tokens.py --tokens 2000000

Tokens come in pieces; inside a piece everything is parallel. What is kept between pieces is a window of keys and values
and the memory itself, however much has been read. Every model runs in a process of its own, whose peak memory is shown.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import torch

from titans_pytorch import TitansConfig, TitansLMM, TitansMAC, TitansMAG, TitansMAL

MODELS = {"mac": TitansMAC, "mag": TitansMAG, "mal": TitansMAL, "lmm": TitansLMM}
CONFIG = TitansConfig(
    dim=64, depth=2, heads=4, memory_heads=1, window=128, memory_chunk=32, memory_refresh=64, memory_expansion=2.0
)
BASELINE = 20_000  # tokens after which memory has been seen to its full extent
REPORTS = 10


def peak_mb() -> float:
    """The most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


@torch.inference_mode()
def stream(variant: str, tokens: int, piece: int, threads: int) -> list[dict[str, float]]:
    """What was seen at the baseline and after each tenth."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, generator = MODELS[variant](256, CONFIG).eval(), torch.Generator().manual_seed(0)
    state, done, reports = None, 0, []
    for stop in sorted({min(BASELINE, tokens), *(tokens * number // REPORTS for number in range(1, REPORTS + 1))}):
        began, before = time.perf_counter(), done
        while done < stop:
            ids = torch.randint(0, 256, (1, min(piece, stop - done)), generator=generator)
            logits, state = model(ids, state)
            done += ids.shape[1]
        if not logits.isfinite().all():
            raise RuntimeError(f"{variant} gave logits that are not finite after {done} tokens")
        speed = (done - before) / (time.perf_counter() - began)
        reports.append({"tokens": done, "tokens_per_second": speed, "peak_mb": peak_mb()})
        print(f"{variant}  {done:>10,} tokens  {speed:>8,.0f} tokens/s  {peak_mb():>6.0f} MB", flush=True)
    return reports


def verdict(variant: str, reports: list[dict[str, float]]) -> str:
    at, last = {report["tokens"]: report for report in reports}, reports[-1]
    baseline, second = at[min(BASELINE, last["tokens"])], at[last["tokens"] * 2 // REPORTS]
    memory = last["peak_mb"] / baseline["peak_mb"]
    speed = last["tokens_per_second"] / second["tokens_per_second"]
    return (
        f"{variant}  peak memory {memory:.3f} of that at {baseline['tokens']:,} tokens,"
        f" speed of the last tenth {speed:.2f} of the second's"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--piece", type=int, default=1024, help="tokens that are read at once")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--variants", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path, help="what was seen, as JSON")
    args = parser.parse_args()
    found = {}
    for variant in args.variants:
        with multiprocessing.get_context("spawn").Pool(1) as process:
            found[variant] = process.apply(stream, (variant, args.tokens, args.piece, args.threads))
        print(verdict(variant, found[variant]), flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
