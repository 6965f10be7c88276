"""Draw how each rule writes one small stream into a linear memory, token by token, as the library runs it.

python docs/draw_rules.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch import NeuralMemory
from titans_pytorch.fast_weights.interface import Carry, PerParameter, Weights, Writes
from titans_pytorch.fast_weights.rules.gates import Gates

WIDTH, NAME = 8, "weights.0"
STREAM = ("a", "b", "c", "d", "e", "b'", "f*", "a", "", "", "", "")
"""What is written: b' is another value under the key of b, f* one of three times the size; then nothing comes"""
PAIRS = ("a", "b", "b'", "c", "d", "e", "f*")
KEPT, MOMENTUM, LOOKED_BACK, LENGTH, THRESHOLD = 0.95, 0.5, 0.5, 0.5, 0.8
STEP = 0.4
"""Of the summed squares, twice the gradient of whose half goes this far: 0.8 of a difference is gone at once"""

OF_SUM = {"sse": 1, "dot": 2, "mse": WIDTH, "yaad": WIDTH, "lp:3": WIDTH}
"""Steps of each loss that go about as far as those of the summed squares"""

PANELS: dict[str, dict[str, Any]] = {
    "Titans, no momentum": dict(momentum=False),
    "Titans": {},
    "gated delta": dict(rule="gated_delta", momentum=False),
    "towards the start": dict(rule="decay_to_start", momentum=False),
    "window of 3 (OmegaNet)": dict(window=3, momentum=False),
    "Atlas, window of 3": dict(rule="atlas", window=3),
    "Yaad": dict(loss="yaad", momentum=False),
    "Moneta": dict(loss="lp:3", rule="lq:4", momentum=False),
    "Memora": dict(loss="mse", rule="kl", momentum=False),
    "dot product (Hebb)": dict(loss="dot", momentum=False),
}


def keys_and_values() -> tuple[Tensor, Tensor]:
    """Of every token of the stream; keys are of length 1 and at right angles, but for those that are equal."""
    drawn = (torch.rand(len(PAIRS), WIDTH, generator=torch.Generator().manual_seed(3)) > 0.5).double()
    values = {pair: value * (3 if pair == "f*" else 1) for pair, value in zip(PAIRS, drawn, strict=True)}
    places = {letter: place for place, letter in enumerate("abcdef")}
    keys = F.one_hot(torch.tensor([places[token[:1] or "a"] for token in STREAM]), WIDTH).double()
    return keys, torch.stack([values[token or "a"] for token in STREAM])


def writes_of(memory: NeuralMemory, loss: str, keys: Tensor, values: Tensor) -> Writes:
    """The whole stream, behind as much of nothing as a window looks back at, with constant gates."""
    older, one = memory.rule.window - 1, torch.ones(1, len(STREAM), dtype=torch.float64)
    rates = STEP * OF_SUM[loss] * torch.tensor([float(bool(token)) for token in STREAM], dtype=torch.float64)
    factors = {"keep": (one * KEPT).log()[None]}
    if memory.rule.num_momenta:
        factors["momentum"] = (one * MOMENTUM).log()[None]
    shares = {"window": one.expand(max(older, 1), -1, -1) * LOOKED_BACK, "length": one[None] * LENGTH}
    return Writes(
        F.pad(keys, (0, 0, older, 0), value=1.0)[None, :, None],
        F.pad(values, (0, 0, older, 0))[None, :, None],
        PerParameter.shared([NAME], F.pad(rates, (older, 0))[None, :, None]),
        PerParameter.shared([NAME], Gates(factors, shares, None)),
        {},
        None,
        {},
        thresholds=torch.full((1, len(STREAM) + older, 1), THRESHOLD, dtype=torch.float64),
        num_older=older,
    )


def memories(options: dict[str, Any]) -> list[Tensor]:
    """Before the stream and after each of its tokens, surprised at every one.  (d d) each"""
    given = dict(model="linear", mem_model_norm_add_residual=False, loss="sse", max_weight_growth=None) | options
    memory = NeuralMemory(WIDTH, 1, 1, **given).double()
    start = 0.1 * torch.randn(1, WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights: Weights = {NAME: memory.rule.begun(start)}
    carry, writes = Carry(weights, weights, {}, weights), writes_of(memory, given["loss"], *keys_and_values())
    found = [weights[NAME][0]]
    for token in range(len(STREAM)):
        block, _ = memory.evolution.store(carry, writes.select(slice(token, token + 1)))
        carry = block.finish()
        carry = carry._replace(base=carry.weights)
        found.append(carry.weights[NAME][0])
    return found


def told(options: dict[str, Any]) -> np.ndarray:
    """How much of each pair's difference at the start is gone after each token.  -> (pair, token)"""
    keys, values = keys_and_values()
    places = [STREAM.index(pair) for pair in PAIRS]
    errors = torch.stack([(keys @ each - values)[places].norm(dim=-1) for each in memories(options)], dim=1)
    return (1 - errors[:, 1:] / errors[:, :1]).numpy()


def draw(path: Path) -> None:
    figure, axes = plt.subplots(2, 5, figsize=(15, 6.2), sharex=True, sharey=True)
    for axis, (name, options) in zip(axes.flat, PANELS.items(), strict=True):
        image = axis.imshow(told(options), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        axis.set_title(name, fontsize=11)
        axis.set_xticks(range(len(STREAM)), [token or "·" for token in STREAM], fontsize=9)
        axis.set_yticks(range(len(PAIRS)), PAIRS, fontsize=9)
        axis.tick_params(length=0)
    for axis in axes[:, 0]:
        axis.set_ylabel("pair that is asked for")
    for axis in axes[1]:
        axis.set_xlabel("token that has come")
    bar = figure.colorbar(image, ax=axes, fraction=0.015, pad=0.01)
    bar.set_label("share of the difference at the start that is gone")
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    draw(Path(__file__).parent / "images" / "rules.png")
