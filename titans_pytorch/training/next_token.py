"""What is trained: a language model, called so that it answers with its loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from titans_pytorch.causal_lm import CausalLM, next_token_loss


class NextTokenLoss(nn.Module):
    """Any language model of the library in the form that many processes wrap; what is saved is the model itself.

    The model is called as a module, since that is where compilation and sharding take hold of it.
    """

    def __init__(self, model: CausalLM[Any]) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, per_token: bool = False, state: Any = None, carries: bool = False
    ) -> Tensor | tuple[Tensor, Any]:
        """ids: (b n) -> the mean loss of all tokens but the first, or that of each (b n-1), in nats

        carries: go on from `state` (None: a sequence begins), and also give the state for the piece that begins with
            the last token
        """
        if carries:
            logits, after = self.model.logits_and_state(ids[:, :-1], state)
            return next_token_loss(logits, ids, per_token), after
        answer = self.model(ids[:, :-1])
        logits = answer if isinstance(answer, Tensor) else answer[0]
        return next_token_loss(logits, ids, per_token)
