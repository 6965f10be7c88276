"""What is no mask, no border and no label is refused in one sentence, before anything is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.sequence_modules import READERS
from tests.test_ragged import model_of, ragged_state, read, tokens_of

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a mask of keys, too": (
        dict(attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.long)),
        ValueError,
        r"attention_mask must have the shape \(batch, tokens\) = \(2, 9\), one value for each new token, got \(2, 1",
    ),
    "a mask of all tokens so far": (
        dict(attention_mask=torch.ones(2, 12, dtype=torch.long)),
        ValueError,
        r"= \(2, 9\), one value for each new token, got \(2, 12\)",
    ),
    "an additive mask": (
        dict(attention_mask=torch.tensor([[0.0] * 9, [-1e9] * 9])),
        TypeError,
        "attention_mask must be boolean or whole numbers, True or 1 for tokens, got torch.float32",
    ),
    "a mask of other numbers": (
        dict(attention_mask=torch.full((2, 9), 3)),
        ValueError,
        "attention_mask must be 1 for tokens and 0 for padding, got other values of torch.int64",
    ),
    "no mask": (dict(attention_mask=[1, 1]), TypeError, "attention_mask must be a tensor .*, got list"),
    "nothing but padding": (
        dict(attention_mask=torch.zeros(2, 9, dtype=torch.long)),
        ValueError,
        "attention_mask must have at least one real token, got only padding",
    ),
    "both": (
        dict(document_ids=torch.zeros(2, 9).long(), cu_seqlens=torch.tensor([0, 9])),
        ValueError,
        "cu_seqlens and document_ids say the same, give one of them, got both",
    ),
    "borders of two rows": (dict(cu_seqlens=torch.tensor([0, 9])), ValueError, "belongs to a single row, got 2 rows"),
    "ids of no kind": (
        dict(document_ids=torch.zeros(2, 9)),
        TypeError,
        "document_ids must be a tensor of whole numbers .*, got torch.float32",
    ),
    "ids of other tokens": (dict(document_ids=torch.zeros(2, 8).long()), ValueError, r"got \(2, 8\)"),
}


@pytest.mark.parametrize("name", ["TitansMAG, plain", "TitansBackbone, lmm", "NeuralMemory, heads"])
@pytest.mark.parametrize("wrong", WRONG)
def test_one_sentence_says_what_is_wrong(name: str, wrong: str) -> None:
    marks, kind, words = WRONG[wrong]
    with pytest.raises(kind, match=words):
        read(model_of(name), tokens_of(name, 2, 9), **marks)


def test_one_sentence_says_what_is_wrong_with_borders_labels_and_embeddings() -> None:
    model: Any = model_of("TitansMAG, plain")
    ids = tokens_of("TitansMAG, plain", 1, 9)
    for borders in ([0, 4], [1, 9], [0, 5, 4, 9], [9]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the number of tokens, 9, got"):
            model(ids, cu_seqlens=torch.tensor(borders))
    with pytest.raises(ValueError, match="either ids or embeds must be given, got neither"):
        model()
    with pytest.raises(ValueError, match="either ids or embeds must be given, got both"):
        model(ids, embeds=torch.zeros(1, 9, 8).double())
    with pytest.raises(ValueError, match="embeds must have 8 features along its last axis, got 7"):
        model(embeds=torch.zeros(1, 9, 7).double())
    with pytest.raises(ValueError, match="labels must be given with embeds, got None"):
        model.loss(embeds=torch.zeros(1, 9, 8).double())
    with pytest.raises(ValueError, match="labels must be from 0 to 10, or -100, got labels from -1 to"):
        model.loss(ids, labels=ids - 1 - ids.min())
    with pytest.raises(TypeError, match=r"labels must be a tensor of int64 or int32 .*, got torch.float32"):
        model.loss(ids, labels=ids.float())
    with pytest.raises(ValueError, match=r"labels must have the shape \(batch, tokens\) = \(1, 9\), got \(1, 8\)"):
        model.loss(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match="labels need return_loss=True, got False"):
        model_of("MemoryAsContextTransformer, plain")(ids, labels=ids)
    _, _, state = ragged_state("TitansMAG, plain")
    with pytest.raises(ValueError, match="state must be of the input's batch size 1, got one of 4"):
        model(ids, state)
    with pytest.raises(TypeError, match="state must be a TitansState, got int"):
        model(ids, 3, attention_mask=torch.ones(1, 9, dtype=torch.long))
    plain: Any = READERS["AttentionTransformer, full"].made()
    with pytest.raises(TypeError, match="padding and documents need states with select and join, got a tuple"):
        plain.logits_and_state(ids.repeat(2, 1), given=dict(attention_mask=torch.ones(2, 9, dtype=torch.long).tril()))
