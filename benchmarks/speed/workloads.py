"""What is measured, as plain data: a new case is one line here and enters the run, the JSON and the tables."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

MODES = ("forward", "training")  # without gradients; forward and backward, gradients of every parameter


@dataclass(frozen=True)
class Case:
    """`NeuralMemory(**memory)` reads and stores `batch` random sequences of `tokens` tokens."""

    name: str
    memory: dict[str, Any]
    batch: int = 1
    tokens: int = 1024
    modes: tuple[str, ...] = MODES
    peer: bool = True  # False where the published package would need tens of gigabytes

    def quick(self) -> Case:
        """The same case in sizes of a smoke test."""
        small = self.memory | {"dim": self.memory["dim"] // 8}
        if "dim_head" in small:
            small["dim_head"] //= 4
        return replace(self, memory=small, tokens=min(max(self.tokens // 8, 256), 1024))


@dataclass(frozen=True)
class Decoding:
    """Tokens come one at a time; `window` of them are timed from each position on."""

    memory: dict[str, Any]
    positions: tuple[int, ...]
    window: int  # whole chunks, so that every window holds its share of chunk ends
    pieces: tuple[int, ...]  # between windows the state advances in these: whole chunks, then single tokens
    peer_up_to: int

    def quick(self) -> Decoding:
        return replace(self, memory=self.memory | {"dim": self.memory["dim"] // 8}, positions=self.positions[:2])


WIDE = {"dim": 384, "chunk_size": 64}
HEADS = {"dim": 384, "dim_head": 64, "heads": 4, "chunk_size": 4, "batch_size": 128}

GROUPS: dict[str, tuple[Case, ...]] = {
    "workloads": (
        Case("chunk-64", WIDE, batch=2),
        Case("chunk-16", WIDE | {"chunk_size": 16}, batch=2),
        Case("heads", HEADS, batch=4, tokens=512),
        Case("heads-spectral", HEADS | {"spectral_norm_surprises": True}, batch=4, tokens=512),
    ),
    "length": (
        Case("length-1k", WIDE, tokens=1_024),
        Case("length-4k", WIDE, tokens=4_096),
        Case("length-16k", WIDE, tokens=16_384, peer=False),
        Case("length-64k", WIDE, tokens=65_536, peer=False, modes=("forward",)),
    ),
    "chunk": (
        Case("every-1", WIDE | {"chunk_size": 1}, peer=False),
        Case("every-4", WIDE | {"chunk_size": 4}, peer=False),
        Case("every-16", WIDE | {"chunk_size": 16}),
        Case("every-64", WIDE | {"chunk_size": 64}),
        Case("every-256", WIDE | {"chunk_size": 256}),
    ),
    "size": (
        Case("dim-64", WIDE | {"dim": 64}, batch=2),
        Case("dim-128", WIDE | {"dim": 128}, batch=2),
        Case("dim-256", WIDE | {"dim": 256}, batch=2),
        Case("dim-512", WIDE | {"dim": 512}, batch=2),
    ),
}
DECODING = Decoding(WIDE, positions=(100, 1_000, 10_000, 100_000), window=128, pieces=(1024, 64, 1), peer_up_to=10_000)

NAMES = (*GROUPS, "decoding", *(case.name for cases in GROUPS.values() for case in cases))
