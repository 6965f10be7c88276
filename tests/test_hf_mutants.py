"""What is between the library and transformers, broken on purpose: a test of its behaviour has to notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="titans_pytorch.hf needs transformers, the extra hf")

from transformers import PreTrainedModel

from tests import test_hf_beside as added
from tests import test_hf_generation as generation
from tests import test_hf_models as models
from titans_pytorch.causal_lm import targets_of
from titans_pytorch.hf import beside, cache, documents, heads, pretrained_model
from titans_pytorch.hf import models as hf_models
from titans_pytorch.initialization import reset_parameters
from titans_pytorch.ragged import read_marked

Patcher = pytest.MonkeyPatch


def weights_begin_as_transformers_has_them(patcher: Patcher) -> None:
    for name in ("_init_weights", "initialize_weights"):
        patcher.setattr(pretrained_model.TitansPreTrainedModel, name, getattr(PreTrainedModel, name))


def all_weights_begin_anew(patcher: Patcher) -> None:
    patcher.setattr(pretrained_model, "reset_parameters", lambda model, only: reset_parameters(model))


def padding_is_read(patcher: Patcher) -> None:
    patcher.setattr(documents, "new_columns", lambda mask, x: None)


def masks_begin_with_the_first_token(patcher: Patcher) -> None:
    def misplaced(mask: Tensor | None, x: Tensor) -> Tensor | None:
        return None if mask is None else mask[:, : x.shape[1]].bool()

    patcher.setattr(documents, "new_columns", misplaced)


def beams_stay_in_their_rows(patcher: Patcher) -> None:
    patcher.setattr(cache.TitansCache, "reorder_cache", lambda self, beam_idx: None)


def nothing_is_taken_back(patcher: Patcher) -> None:
    patcher.setattr(cache.TitansCache, "crop", lambda self, tokens_to_remove: None)


def all_of_a_call_is_taken_back(patcher: Patcher) -> None:
    original = cache.TitansCache.crop

    def forgetful(self: cache.TitansCache, tokens_to_remove: int) -> None:
        length = self.get_seq_length() + tokens_to_remove
        original(self, tokens_to_remove)
        self.pending, self.num_read = None, length

    patcher.setattr(cache.TitansCache, "crop", forgetful)


def padded_labels_count(patcher: Patcher) -> None:
    patcher.setattr(heads, "targets_of", lambda labels, marks: targets_of(labels, None))


def documents_run_into_each_other(patcher: Patcher) -> None:
    patcher.setattr(hf_models, "marks_of_call", lambda *_: None)


def states_are_not_kept(patcher: Patcher) -> None:
    def forgetting(read: Any, x: Tensor, marks: Any, state: Any) -> Any:
        return read_marked(read, x, marks, state)[0], state

    patcher.setattr(cache, "read_marked", forgetting)


def gates_begin_open(patcher: Patcher) -> None:
    def opened(self: beside.AddedMemory) -> None:
        for gate in self.gates:
            torch.nn.init.ones_(gate)

    patcher.setattr(beside.AddedMemory, "reset_parameters", opened)


def an_added_memory_reads_padding(patcher: Patcher) -> None:
    patcher.setattr(beside, "new_columns", lambda mask, x: None)


def an_added_memory_stays_in_its_rows(patcher: Patcher) -> None:
    patcher.delattr(beside.Remembering, "reorder_cache")


def an_added_memory_takes_nothing_back(patcher: Patcher) -> None:
    """Silently: the check of lengths is off, too."""
    patcher.delattr(beside.Remembering, "crop")
    patcher.setattr(cache.TitansCache, "get_seq_length", lambda self, layer_idx=0: Anything())


class Anything(int):
    """A length that fits whatever it is compared with."""

    def __add__(self, other: int) -> Anything:
        return self

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def trace(padded: Callable[..., Any], use_cache: bool) -> Callable[[Path], None]:
    return lambda _: models.test_a_padded_token_leaves_no_trace("mag", padded, use_cache)


CAUGHT: list[tuple[Callable[[Patcher], None], Callable[[Path], None]]] = [
    (weights_begin_as_transformers_has_them, lambda _: models.test_models_begin_as_those_of_the_library("mag")),
    (all_weights_begin_anew, lambda to: models.test_what_a_file_lacks_begins_as_it_does_in_the_library("mag", to)),
    (padding_is_read, trace(models.left_padded, False)),
    (padding_is_read, trace(models.with_holes, True)),
    (
        masks_begin_with_the_first_token,
        lambda _: generation.test_prompts_of_different_lengths_are_continued_as_each_alone("mag"),
    ),
    (beams_stay_in_their_rows, lambda _: generation.test_beams_are_those_of_a_search_without_cache("mag")),
    (nothing_is_taken_back, lambda _: generation.test_prompt_lookup_is_greedy("mag", 5)),
    (all_of_a_call_is_taken_back, lambda _: generation.test_a_rollback_leaves_no_trace("mag")),
    (
        padded_labels_count,
        lambda _: models.test_a_padded_batch_has_the_loss_and_gradients_of_its_rows("mag", models.left_padded),
    ),
    (documents_run_into_each_other, lambda _: models.test_documents_of_a_row_are_read_as_if_alone("mag", True)),
    (gates_begin_open, lambda _: added.test_nothing_changes_until_it_is_trained("gpt2")),
    (an_added_memory_reads_padding, lambda _: added.test_padding_is_not_remembered("gpt2")),
    (an_added_memory_stays_in_its_rows, lambda _: added.test_generating_reads_every_token_once("gpt2")),
    (an_added_memory_takes_nothing_back, lambda _: added.test_generating_reads_every_token_once("gpt2")),
    (states_are_not_kept, lambda _: generation.test_greedy_is_that_of_the_library("mag")),
]


@pytest.mark.parametrize("break_it, check", CAUGHT, ids=lambda each: getattr(each, "__name__", ""))
def test_a_mutant_is_caught(break_it: Any, check: Any, monkeypatch: Patcher, tmp_path: Path) -> None:
    check(tmp_path)
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        check(tmp_path)
