"""The harness lm-eval with models of the library: nothing is cut off in silence, and documents are read whole.

    python -m titans_pytorch.hf.evaluation run --model titans --model_args pretrained=FOLDER --tasks wikitext

Needs the extra `eval`: pip install 'titans-pytorch[eval]'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.checks import value_checks
from titans_pytorch.hf.tokenizer import NO_LIMIT

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as missing:
    raise ImportError("titans_pytorch.hf.evaluation needs lm-eval: pip install 'titans-pytorch[eval]'") from missing

PIECE = 4096
"""Tokens of a document that are read at once; the state goes on to the next ones"""


@register_model("titans")
class TitansLM(HFLM):  # type: ignore[misc]
    """A model of `titans_pytorch.hf` for lm-eval, of any length unless `max_length` says otherwise.

    Whole documents (tasks of `loglikelihood_rolling`, as perplexities are) are read in pieces through which the state
    goes, so that every token is predicted from all before it. `HFLM` cuts them into windows of `max_length` that each
    begin without memory; rolling="windows" does that, for a number that compares with other models' numbers. A prompt
    that is longer than max_length is an error, where `HFLM` leaves out its beginning.

    Args:
        pretrained: a folder, or a model
        rolling: "stream" or "windows", which needs max_length
        max_length: tokens of a prompt and its answer, at most; None: no limit
        piece: tokens that are read at once
        kwargs: further arguments of `HFLM`, as tokenizer, batch_size, device, dtype
    """

    def __init__(
        self,
        pretrained: Any,
        rolling: str = "stream",
        max_length: int | None = None,
        piece: int = PIECE,
        **kwargs: Any,
    ) -> None:
        value_checks.check_choice("rolling", rolling, ("stream", "windows"))
        value_checks.check_whole(max_length=max_length, piece=piece)
        if rolling == "windows" and max_length is None:
            raise ValueError("rolling='windows' needs max_length, the length of a window, got None")
        if str(kwargs.get("batch_size")).startswith("auto") and max_length is None:
            raise ValueError("batch_size='auto' needs max_length, to try how many sequences fit, got None")
        if (backend := kwargs.pop("backend", "causal")) != "causal":
            raise ValueError(f"backend must be 'causal', got {backend!r}")
        self.rolling, self.piece = rolling, piece
        limit = NO_LIMIT if max_length is None else max_length
        super().__init__(pretrained, backend="causal", max_length=limit, **kwargs)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log probabilities of whole documents."""
        if self.rolling == "windows":
            windowed: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
            return windowed
        found = []
        for request in requests:
            (document,) = request.args
            found.append(self.log_probability(self.tok_encode(document)))
            self.cache_hook.add_partial("loglikelihood_rolling", (document,), found[-1])
        return found

    @torch.no_grad()
    def log_probability(self, tokens: Sequence[int]) -> float:
        """The sum over all tokens of a document, the first being predicted from the prefix token."""
        ids = torch.tensor([[self.prefix_token_id, *tokens]], device=self.device)
        total, cache = 0.0, None
        for start in range(0, len(tokens), self.piece):
            fed, following = ids[:, start : start + self.piece], ids[:, start + 1 : start + self.piece + 1]
            read = self.model(fed[:, : following.shape[1]], past_key_values=cache, use_cache=True)
            cache = read.past_key_values
            total -= float(F.cross_entropy(read.logits[0].double(), following[0], reduction="sum"))
        return total

    # ---- nothing is cut off, and nothing moved

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """A prompt and its answer; blanks at the prompt's end stay there if tokens end there, too, as bytes do."""
        whole, before = self.tok_encode(context + continuation), self.tok_encode(context)
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return pair

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        for _, context, continuation in requests:
            self.check_length(len(context) + len(continuation) - 1)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Texts as a padded batch of ids, and its mask."""
        ids, mask = super().tok_batch_encode(strings, padding_side=padding_side, **kwargs)
        if left_truncate_len is not None:
            self.check_length(ids.shape[1] + self.max_length - left_truncate_len)
        return ids, mask

    def check_length(self, needed: int) -> None:
        """Refuse what does not fit."""
        if needed > self.max_length:
            raise ValueError(
                f"max_length must be at least the {needed} tokens of a prompt and its answer, got {self.max_length}: "
                "nothing is left out"
            )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
