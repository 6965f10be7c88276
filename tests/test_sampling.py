"""Filters against their definitions, sampling against probabilities, the loop against a table."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from titans_pytorch.sampling import generate, gumbel_sample, min_p_filter, top_k_filter, top_p_filter

PROBS = torch.tensor([0.05, 0.4, 0.3, 0.02, 0.23])


def kept(logits: Tensor) -> list[int]:
    return logits.isfinite().nonzero().flatten().tolist()


@pytest.mark.parametrize("min_p, expected", [(0.0, [0, 1, 2, 3, 4]), (0.1, [0, 1, 2, 4]), (0.6, [1, 2]), (1.0, [1])])
def test_min_p_keeps_what_is_near_the_most_probable(min_p: float, expected: list[int]) -> None:
    assert kept(min_p_filter(PROBS.log(), min_p)) == expected


@pytest.mark.parametrize("k, expected", [(1, [1]), (3, [1, 2, 4]), (9, [0, 1, 2, 3, 4])])
def test_top_k_keeps_the_k_most_probable(k: int, expected: list[int]) -> None:
    assert kept(top_k_filter(PROBS.log(), k)) == expected


@pytest.mark.parametrize(
    "p, expected", [(0.0, [1]), (0.39, [1]), (0.5, [1, 2]), (0.9, [1, 2, 4]), (1.0, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_the_fewest_that_reach_p(p: float, expected: list[int]) -> None:
    assert kept(top_p_filter(PROBS.log(), p)) == expected


def test_filters_leave_what_they_keep_and_treat_rows_apart() -> None:
    logits = torch.randn(3, 7)
    for fn in (min_p_filter, top_k_filter, top_p_filter):
        filtered = fn(logits)
        assert_close(torch.stack([fn(row) for row in logits]), filtered)
        assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])


def test_sampling_follows_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = gumbel_sample(PROBS.log().expand(40_000, -1), generator=generator)
    assert_close(drawn.bincount(minlength=5) / 40_000, PROBS, rtol=0, atol=0.01)
    assert (gumbel_sample(PROBS.log().expand(100, -1), temperature=0.0) == 1).all()
    again = gumbel_sample(PROBS.log().expand(40_000, -1), generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


def follow(table: list[int]):
    return lambda fed: torch.nn.functional.one_hot(torch.tensor(table)[fed[:, -1]], len(table)).float()


def greedily(table: list[int], prompt: list[list[int]], count: int, **kwargs: object) -> list[list[int]]:
    fixed = dict(temperature=0.0, filter_fn=min_p_filter, filter_kwargs={})
    return generate(follow(table), torch.tensor(prompt), count, **fixed, **kwargs).tolist()


def test_the_loop_feeds_what_it_drew_and_stops() -> None:
    assert greedily([1, 2, 3, 0], [[0], [2]], 5) == [[1, 2, 3, 0, 1], [3, 0, 1, 2, 3]]
    assert greedily([1, 2, 3, 0], [[0], [2]], 5, stop_token=3) == [[1, 2, 3], [3, 3, 3]]
    assert greedily([1, 2, 3, 0], [[0]], 0) == [[]]


@pytest.mark.parametrize(
    "call",
    [
        lambda: min_p_filter(PROBS, 1.5),
        lambda: top_p_filter(PROBS, -0.1),
        lambda: top_k_filter(PROBS, 0),
        lambda: gumbel_sample(PROBS, -1.0),
    ],
)
def test_refuses_wrong_arguments(call) -> None:
    with pytest.raises(ValueError, match="must be"):
        call()
