"""Mutants of Miras, thresholds of tokens, retentions, where memories begin; and of lengths that are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mutants.breaking import mutant, wrapped, writes_become
from titans_pytorch.fast_weights import renewal
from titans_pytorch.fast_weights.rules.retention import KullbackLeibler, QNorm, Retained
from titans_pytorch.losses import HuberOfTokens
from titans_pytorch.memory import core
from titans_pytorch.memory.recent import RecentWrites


@mutant("yaad", "yaad, window")
def thresholds_are_ignored(patcher: pytest.MonkeyPatch) -> None:
    writes_become(patcher, thresholds=lambda thresholds: thresholds + 1e6)


@mutant("yaad")
def tokens_trade_thresholds(patcher: pytest.MonkeyPatch) -> None:
    writes_become(patcher, thresholds=lambda thresholds: thresholds.flip(-1))


@mutant("yaad, window")
def what_was_recent_has_no_threshold(patcher: pytest.MonkeyPatch) -> None:
    def changed(original: Any, self: RecentWrites, writes: Any) -> Any:
        return original(self._replace(thresholds=self.thresholds * 1e6), writes)

    wrapped(patcher, RecentWrites, "before", changed)


@mutant("yaad", "yaad, window")
def beyond_its_threshold_nothing_is_stored(patcher: pytest.MonkeyPatch) -> None:
    def changed(original: Any, self: HuberOfTokens, prediction: Tensor, value: Tensor) -> Tensor:
        size = (prediction - value).square().mean(dim=-1).sqrt()
        return original(self, prediction, value) * (size <= self.thresholds).unsqueeze(-1)

    wrapped(patcher, HuberOfTokens, "gradient", changed)


@mutant("moneta")
def the_norm_is_skipped(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(QNorm, "weights_of", lambda self, moved: moved)


@mutant("moneta")
def the_norm_is_of_another_power(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(QNorm, "norm", lambda self, x: x.square().sum(dim=(-2, -1), keepdim=True).sqrt())


@mutant("moneta")
def the_norm_is_of_columns(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(QNorm, "norm", lambda self, x: x.pow(4).sum(dim=-2, keepdim=True).pow(0.25))


@mutant("moneta")
def weights_are_moved_where_they_are_read(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(QNorm, "moved_from", lambda self, weights: weights)


@mutant("memora")
def shares_are_of_rows(patcher: pytest.MonkeyPatch) -> None:
    def weights_of(self: KullbackLeibler, moved: Tensor) -> Tensor:
        return moved.softmax(dim=-1) * moved.shape[-2] ** 0.5

    patcher.setattr(KullbackLeibler, "weights_of", weights_of)


@mutant("memora")
def shares_are_of_one(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, KullbackLeibler, "weights_of", lambda original, self, moved: original(self, moved) / 2)


@mutant("memora")
def logarithms_are_not_forgotten(patcher: pytest.MonkeyPatch) -> None:
    def retain(original: Any, self: Retained, weights: Any, step: Any, gates: Any, start: Any) -> Any:
        if weights.ndim < 3:
            return original(self, weights, step, gates, start)
        return self.retention.weights_of(self.retention.moved_from(weights) + step)

    wrapped(patcher, Retained, "retain", retain)


@mutant("memora")
def weights_are_forgotten_and_not_logarithms(patcher: pytest.MonkeyPatch) -> None:
    def retain(original: Any, self: Retained, weights: Any, step: Any, gates: Any, start: Any) -> Any:
        if weights.ndim < 3:
            return original(self, weights, step, gates, start)
        kept = weights * gates.keep.value.reshape(-1, 1, 1)
        return self.retention.weights_of(kept.log() + step + torch.linspace(0, 0.1, weights.shape[1])[:, None])

    wrapped(patcher, Retained, "retain", retain)


@mutant("memora")
def a_start_is_no_distribution(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(KullbackLeibler, "begun", lambda self, weights: weights.abs() + 0.01)


@mutant("lengths")
def lengths_are_of_inputs(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(core, "lengths_of", lambda weights: {n: w.norm(dim=-1, keepdim=True) for n, w in weights.items() if w.ndim > 2})  # fmt: skip  # noqa: E501


@mutant("lengths")
def lengths_are_of_one(patcher: pytest.MonkeyPatch) -> None:
    wrapped(
        patcher,
        renewal,
        "with_length",
        lambda original, weight, length: original(weight, None if length is None else length / length),
    )


@mutant("lengths")
def lengths_are_not_kept(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(renewal, "with_length", lambda weight, length: weight)
