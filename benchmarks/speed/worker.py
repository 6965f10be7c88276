"""One library in one process: requests are JSON lines on stdin, answers JSON lines on stdout.

Runs in any environment that has torch and titans_pytorch, and imports nothing else but a file beside it.  measure.py
starts it with `python -I`, so that the environment's own titans_pytorch answers unless `--checkout` puts another one
first.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))  # `python -I` leaves it out
from high_water import high_water

Answer = dict[str, Any]


class Session:
    """The module under measurement and its inputs; each public method is one kind of request."""

    def __init__(self, library: types.ModuleType, device: str) -> None:
        self.library = library
        self.device = torch.device(device)

    def hello(self) -> Answer:
        on_cuda = self.device.type == "cuda"
        return {
            "file": self.library.__file__,
            "python": ".".join(map(str, sys.version_info[:3])),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(self.device) if on_cuda else None,
            "has_accelerated_scan": importlib.util.find_spec("accelerated_scan") is not None,
        }

    def build(self, memory: Answer, batch: int, tokens: int, dtype: str) -> Answer:
        """Both sides draw from the same seed, and never zeros."""
        self.forget()
        torch.manual_seed(0)
        self.module = self.library.NeuralMemory(**memory).to(self.device)
        self.seq = torch.randn(batch, tokens, memory["dim"]).to(self.device)
        self.probe = torch.randn_like(self.seq)
        self.dtype = getattr(torch, dtype)
        self.state, self.seen = None, 0
        return {}

    def forget(self) -> Answer:
        """Give back the memory of what was built before; a GPU's is shared with other processes."""
        self.module = self.seq = self.probe = self.state = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {}

    def publish(self, path: str) -> Answer:
        """Leave parameters, input and output behind, for the other side to `adopt`."""
        out, _ = self._forward()
        torch.save({"state_dict": self.module.state_dict(), "seq": self.seq, "out": out}, path)
        return {}

    def adopt(self, path: str) -> Answer:
        """Take over parameters and input, and say how far the output is from the published one (relative, L2)."""
        published = torch.load(path, map_location=self.device, weights_only=True)
        self.module.load_state_dict(published["state_dict"])
        self.seq, expected = published["seq"], published["out"].double()
        difference = (self._forward()[0].double() - expected).norm() / expected.norm()
        return {"difference": difference.item() if difference.isfinite() else None}

    def time(self, mode: str) -> Answer:
        gc.collect()
        with self._clock() as seconds:
            kept = getattr(self, f"_{mode}")()
        return {"seconds": seconds()} | describe(*kept)

    def peak(self, mode: str) -> Answer:
        """How far one call raises the high-water mark of memory; on a CPU only the first call of a process can tell."""
        self.module.zero_grad(set_to_none=True)
        gc.collect()
        before = self._high_water(start=True)
        kept = getattr(self, f"_{mode}")()
        return {"peak_bytes": self._high_water() - before} | describe(*kept)

    def decode(self, position: int, window: int, pieces: list[int]) -> Answer:
        """Milliseconds per token for `window` single tokens after the first `position` ones."""
        for piece in pieces:
            while self.seen + piece <= position:
                self._read(self._random_tokens(piece))
        milliseconds = []
        for token in self._random_tokens(window).split(1, dim=1):
            with self._clock() as seconds:
                self._read(token)
            milliseconds.append(1e3 * seconds())
        mean, worst = statistics.fmean(milliseconds), max(milliseconds)
        return {"mean_ms": mean, "worst_ms": worst, "state_bytes": owned_bytes(self.state)}

    def matmul(self, size: int) -> Answer:
        """One square product, the machine's own rate."""
        left, right = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        with self._clock() as seconds:
            left @ right
        return {"seconds": seconds()}

    def newton_schulz(self, form: str, mode: str, matrices: list[tuple[int, int, int]]) -> Answer:
        """The products alone, on (count, rows, columns) random matrices for each of the memory's matrices.

        `gram` is the library's own function, on the small square side; only this checkout is asked.
        """
        from titans_pytorch.fast_weights.rules.orthogonal import COEFFICIENTS, NUM_ITERATIONS, orthogonalised

        direct = partial(direct_form, coefficients=COEFFICIENTS, iterations=NUM_ITERATIONS)
        product = {"direct": direct, "gram": orthogonalised}[form]
        is_training, total = mode == "training", 0.0
        for count, *shape in matrices:
            for step in torch.randn(count, *shape, device=self.device).split(256):
                step = step.clone().requires_grad_(is_training)  # a leaf of its own: no gradient is scattered
                with self._clock() as seconds, self._precision(), torch.set_grad_enabled(is_training):
                    result = product(step)
                    if is_training:
                        result.backward(torch.ones_like(result))
                total += seconds()
        return {"seconds": total}

    def _forward(self) -> tuple[Tensor, Any]:
        with torch.no_grad(), self._precision():
            return self.module(self.seq)

    def _training(self) -> tuple[Tensor, Any]:
        self.module.zero_grad(set_to_none=True)
        with self._precision():
            out, _ = self.module(self.seq)
        (out * self.probe).sum().backward()
        return out.detach(), None

    def _read(self, seq: Tensor) -> None:
        with torch.no_grad(), self._precision():
            _, self.state = self.module(seq, state=self.state)
        self.seen += seq.shape[1]

    def _random_tokens(self, count: int) -> Tensor:
        return torch.randn(1, count, self.seq.shape[-1]).to(self.device)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @contextlib.contextmanager
    def _clock(self) -> Iterator[Callable[[], float]]:
        """Seconds of what happens inside, on a GPU between two events of its own."""
        self._synchronize()
        elapsed: list[float] = []
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield lambda: elapsed[0]
            end.record()
            self._synchronize()
            elapsed.append(begin.elapsed_time(end) / 1e3)
            return
        start = time.perf_counter()
        yield lambda: elapsed[0]
        elapsed.append(time.perf_counter() - start)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _high_water(self, start: bool = False) -> int:
        if self.device.type != "cuda":
            return high_water()
        if start:
            torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def direct_form(t: Tensor, coefficients: tuple[float, float, float], iterations: int) -> Tensor:
    """Each time t <- a t + (b A + c A A) t with A = t t', on the normalised and, if need be, transposed matrix."""
    a, b, c = coefficients
    t = t / t.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    t = t.mT if t.shape[-2] > t.shape[-1] else t
    for _ in range(iterations):
        gram = t @ t.mT
        t = a * t + (b * gram + c * gram @ gram) @ t
    return t


def describe(out: Tensor, state: Any) -> Answer:
    facts: Answer = {"output_bytes": out.untyped_storage().nbytes(), "finite": bool(out.isfinite().all())}
    return facts if state is None else facts | {"state_bytes": owned_bytes(state)}


def owned_bytes(root: Any) -> int:
    """The storage that an object keeps alive, whatever its class, without calling any of its code."""
    storages: dict[int, int] = {}
    seen, waiting = set(), [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, (type, types.ModuleType, types.FunctionType, torch.nn.Module)):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        else:
            waiting += gc.get_referents(thing)
    return sum(storages.values())


def serve(session: Session, answers: Any) -> None:
    """Whatever goes wrong in a library is an answer too."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(session, request.pop("do"))(**request)
        except Exception as error:
            message = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {message[:200]}"}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkout", help="take titans_pytorch from this folder instead of the environment")
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is not an answer
    if arguments.checkout:
        sys.path.insert(0, arguments.checkout)
    import titans_pytorch

    serve(Session(titans_pytorch, arguments.device), answers)


if __name__ == "__main__":
    main()
