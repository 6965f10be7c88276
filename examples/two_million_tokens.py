"""Stream two million tokens through each of the four Titans models, on a CPU, and watch speed and memory stay flat.

    python examples/two_million_tokens.py --tokens 2000000

Tokens come in pieces; inside a piece everything is parallel. What is kept between pieces is a window of keys and values
and the memory itself, however much has been read.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch

from titans_pytorch import TitansConfig, TitansLMM, TitansMAC, TitansMAG, TitansMAL

MODELS = {"mac": TitansMAC, "mag": TitansMAG, "mal": TitansMAL, "lmm": TitansLMM}
CONFIG = TitansConfig(
    dim=64, depth=2, heads=4, memory_heads=1, window=128, memory_chunk=32, memory_refresh=64, memory_expansion=2.0
)
REPORTS = 10


def resident_mb() -> float:
    """Memory of this process now; its peak where the system does not say."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 1024


@torch.inference_mode()
def stream(variant: str, tokens: int, piece: int) -> list[tuple[int, float, float]]:
    """-> (tokens so far, tokens per second since the last report, MB) of each tenth"""
    torch.manual_seed(0)
    model, generator = MODELS[variant](256, CONFIG).eval(), torch.Generator().manual_seed(0)
    state, done, reports = None, 0, []
    for number in range(1, REPORTS + 1):
        stop, began, before = tokens * number // REPORTS, time.perf_counter(), done
        while done < stop:
            ids = torch.randint(0, 256, (1, min(piece, stop - done)), generator=generator)
            logits, state = model(ids, state)
            done += ids.shape[1]
        if not logits.isfinite().all():
            raise RuntimeError(f"{variant} gave logits that are not finite after {done} tokens")
        speed = (done - before) / (time.perf_counter() - began)
        reports.append((done, speed, resident_mb()))
        print(f"{variant}  {done:>10,} tokens  {speed:>8,.0f} tokens/s  {reports[-1][2]:>6.0f} MB", flush=True)
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--piece", type=int, default=4096, help="tokens that are read at once")
    parser.add_argument("--variants", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    for variant in args.variants:
        stream(variant, args.tokens, args.piece)


if __name__ == "__main__":
    main()
