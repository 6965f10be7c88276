"""From logits to tokens: filters, sampling, and the loop that generates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn

NextLogits = Callable[[Tensor], Tensor]  # new tokens (b n) -> logits of the token after them (b v)


def min_p_filter(logits: Tensor, min_p: float = 0.1) -> Tensor:
    """Remove tokens with less than min_p times the largest probability.  (... v) -> same, removed ones at -inf"""
    _check_share("min_p", min_p)
    if min_p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(min_p), -math.inf)


def top_k_filter(logits: Tensor, k: int = 50) -> Tensor:
    """Keep the k most probable tokens (all, if there are fewer; more, if several are equal).  (... v) -> same"""
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k must be a whole number of at least 1, got {k!r}")
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def top_p_filter(logits: Tensor, p: float = 0.9) -> Tensor:
    """Keep the most probable tokens that together reach the probability p, at least one.  (... v) -> same"""
    _check_share("p", p)
    ordered, order = logits.sort(dim=-1, descending=True)
    before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
    removed = before >= p
    removed[..., 0] = False
    return logits.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -math.inf)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in eval mode, and afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {share}")


def gumbel_sample(logits: Tensor, temperature: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Draw from softmax(logits / temperature) as the argmax with Gumbel noise; greedily at 0.  (b v) -> (b)"""
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if temperature == 0:
        return logits.argmax(dim=-1)
    waits = torch.empty(logits.shape, device=logits.device).exponential_(generator=generator)
    return (logits / temperature - waits.clamp(min=1e-30).log()).argmax(dim=-1)


def draw(
    next_logits: NextLogits,
    prompt: Tensor,
    count: int,
    *,
    temperature: float,
    filter_fn: Callable[..., Tensor],
    filter_kwargs: Mapping[str, Any] | None = None,
    stop_token: int | None = None,
    generator: Generator | None = None,
    show_progress: bool = False,
) -> Iterator[Tensor]:
    """Up to `count` tokens (b 1) after a prompt (b n), one by one as they are drawn.

    temperature: 0 is greedy; filter_fn: (logits, **filter_kwargs) -> logits with removed tokens at -inf; stop_token:
    after which a row only repeats it, and where all rows have it drawing ends; generator: makes it reproducible
    """
    if not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable, got {filter_fn!r}")
    fed, filter_kwargs = prompt, filter_kwargs or {}
    stopped = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    for _ in _progress(count, show_progress):
        logits = filter_fn(next_logits(fed), **filter_kwargs)
        drawn = gumbel_sample(logits, temperature, generator).to(prompt.dtype)
        if stop_token is not None:
            drawn = torch.where(stopped, stop_token, drawn)
            stopped = drawn == stop_token
        fed = drawn[:, None]
        yield fed
        if stop_token is not None and stopped.all():
            break


def generate(next_logits: NextLogits, prompt: Tensor, count: int, **options: Any) -> Tensor:
    """Up to `count` tokens after a prompt (b n), fewer if all rows have stopped; stopped rows repeat the stop token."""
    tokens = list(draw(next_logits, prompt, count, **options))
    return torch.cat(tokens, dim=1) if tokens else prompt[:, :0]


def _progress(count: int, is_shown: bool) -> Any:
    if not is_shown:
        return range(count)
    from tqdm import trange  # only here, since nothing else needs it

    return trange(count)
