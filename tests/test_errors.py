"""Wrong arguments and inputs are refused with a message that says what was wrong, what came and what is allowed."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch import MemoryMLP, NeuralMemory, memory_models

DIM = 8


def shown(value: object) -> str:
    """The name of a case, the same in every process: without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value)).replace("\n", "")[:60]


def memory(**options: Any) -> NeuralMemory:
    return NeuralMemory(**{"dim": DIM, "chunk_size": 4} | options)


def seq(*shape: int) -> Tensor:
    return torch.zeros(shape or (2, 6, DIM))


def refused(error: type[Exception], *words: str) -> Any:
    """Expects the error, and every word in its message."""
    pattern = "".join(f"(?=.*{word})" for word in words)
    return pytest.raises(error, match=f"(?s)^{pattern}")


# construction: (arguments, error, what the message has to say)
ARGUMENTS: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    *(
        ({name: size, "heads": 2} if name == "dim_head" else {name: size}, ValueError, (name, str(size), "positive"))
        for name in ("dim", "dim_head", "heads", "chunk_size", "batch_size", "momentum_order", "num_kv_per_token")
        for size in (0, -4)
    ),
    *(
        ({name: size}, ValueError, (name, str(size), "positive"))
        for name in ("default_step_transform_max_lr", "max_mem_layer_modulation", "max_grad_norm", "max_weight_growth")
        for size in (0.0, -1.0)
    ),
    ({"dim": 8.0}, TypeError, ("dim", "8.0", "whole")),
    ({"dim": "8"}, TypeError, ("dim", "'8'", "whole")),
    ({"heads": True}, TypeError, ("heads", "True", "whole")),
    ({"momentum": "no"}, TypeError, ("momentum", "'no'", "True or False")),
    ({"qk_rmsnorm": 1}, TypeError, ("qk_rmsnorm", "1", "True or False")),
    ({"model": nn.GELU()}, ValueError, ("GELU", "no parameters")),
    ({"heads": 2.5}, TypeError, ("heads", "2.5", "whole")),
    ({"batch_size": 8.0}, TypeError, ("batch_size", "8.0", "whole")),
    ({"max_grad_norm": "1"}, TypeError, ("max_grad_norm", "'1'", "number")),
    ({"max_grad_norm": float("nan")}, ValueError, ("max_grad_norm", "nan", "positive")),
    ({"max_weight_growth": 0.5}, ValueError, ("max_weight_growth", "0.5", "at least 1")),
    ({"chunk_size": 4.0}, TypeError, ("chunk_size", "4.0", "whole")),
    ({"chunk_size": None}, TypeError, ("chunk_size", "None", "whole")),
    ({"chunk_size": True}, TypeError, ("chunk_size", "True", "whole")),
    ({"chunk_size": (4, 0)}, ValueError, ("chunk_size", "stor", "0", "positive")),
    ({"chunk_size": (-1, 4)}, ValueError, ("chunk_size", "read", "-1", "positive")),
    ({"chunk_size": (4, 4, 4)}, ValueError, ("chunk_size", "pair", r"\(4, 4, 4\)")),
    ({"dim_head": 4}, ValueError, ("dim_head", "4", "8", "heads")),
    ({"batch_size": 6}, ValueError, ("batch_size", "6", "multiple", "4")),
    ({"batch_size": 4, "chunk_size": (2, 8)}, ValueError, ("batch_size", "4", "multiple", "8")),
    ({"chunk_size": 1, "attn_pool_chunks": True}, ValueError, ("attn_pool_chunks", "1", "at least 2")),
    (
        {"learned_momentum_combine": True},
        ValueError,
        ("learned_momentum_combine", "momentum_order=1", "more than one"),
    ),
    (
        {"learned_momentum_combine": True, "momentum": False, "momentum_order": 2},
        ValueError,
        ("learned_momentum_combine", "momentum=False"),
    ),
    ({"init_momentum_bias": 1.0, "momentum": False}, ValueError, ("init_momentum_bias", "1.0", "momentum=False")),
    ({"model": "MemoryMLP"}, ValueError, ("model", "MemoryMLP", "nn.Module", "mlp")),
    ({"model": 3}, TypeError, ("model", "int", "nn.Module")),
    ({"model": MemoryMLP}, TypeError, ("model", "nn.Module")),
    ({"activation": "silu"}, TypeError, ("activation", "str")),
    ({"activation": F.silu}, TypeError, ("activation", "function")),
    ({"store_memory_loss_fn": "mse"}, TypeError, ("store_memory_loss_fn", "str")),
    ({"store_memory_loss_fn": F.mse_loss}, ValueError, ("store_memory_loss_fn", r"\(\)")),
    ({"store_memory_loss_fn": lambda a: a}, ValueError, ("store_memory_loss_fn",)),
    ({"adaptive_step_transform": 0.1}, TypeError, ("adaptive_step_transform", "float")),
    ({"adaptive_step_transform": "hard"}, ValueError, ("adaptive_step_transform", "'sparse'", "'hard'")),
    (
        {"adaptive_step_transform": lambda t: t.sum()},
        ValueError,
        ("adaptive_step_transform", "elementwise"),
    ),
    ({"default_model_kwargs": {"depth": 0}}, ValueError, ("depth", "0", "positive")),
    ({"default_model_kwargs": {"width": 3}}, TypeError, ("width",)),
    ({"engine": "fastest"}, ValueError, ("engine", "fastest", "factored", "dense", "general")),
    (
        {"engine": "factored", "spectral_norm_surprises": True},
        ValueError,
        ("engine", "factored", "spectral_norm_surprises"),
    ),
    ({"init_decay_bias": "0"}, TypeError, ("init_decay_bias",)),
    *(({"conv_size": size}, ValueError, ("conv_size", str(size), "positive")) for size in (0, -4)),
    *(({"conv_size": size}, TypeError, ("conv_size", str(size), "whole")) for size in (4.0, True, "4")),
    *(
        ({name: given}, TypeError, (name, str(given), "True or False"))
        for name in (
            "qk_l2norm",
            "summed_loss",
            "per_parameter_gates",
            "channelwise_decay",
            "learned_norm_gain",
            "gated_output",
        )
        for given in (None, 1, "yes")
    ),
    ({"qk_l2norm": True, "qk_rmsnorm": True}, ValueError, ("qk_l2norm", "qk_rmsnorm", "exclude")),
    (
        {"summed_loss": True, "store_memory_loss_fn": lambda a, b: (a - b).abs().sum(dim=-1)},
        ValueError,
        ("summed_loss", "store_memory_loss_fn", "exclude"),
    ),
    (
        {"learned_norm_gain": True, "mem_model_norm_add_residual": False},
        ValueError,
        ("learned_norm_gain", "mem_model_norm_add_residual=True", "False"),
    ),
]


@pytest.mark.filterwarnings("ignore:momentum_order")
@pytest.mark.parametrize("options, error, words", ARGUMENTS, ids=shown)
def test_wrong_arguments_are_refused(options: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    with refused(error, *words):
        memory(**options)


PAPER_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"dim": 0}, ValueError, ("dim", "0", "positive")),
    ({"dim": 8.0}, TypeError, ("dim", "8.0", "whole")),
    ({"heads": 3}, ValueError, ("dim", "multiple of heads", "3", "8", "dim_head")),
    ({"heads": 0}, ValueError, ("heads", "0", "positive")),
    ({"chunk_size": 0}, ValueError, ("chunk_size", "0", "positive")),
    ({"qk_rmsnorm": True}, ValueError, ("qk_l2norm", "qk_rmsnorm", "exclude")),
    ({"size": 3}, TypeError, ("size",)),
]


@pytest.mark.parametrize("options, error, words", PAPER_ARGUMENTS, ids=shown)
def test_wrong_arguments_of_the_papers_memory_are_refused(
    options: dict[str, Any], error: type[Exception], words: tuple[str, ...]
) -> None:
    with refused(error, *words):
        NeuralMemory.paper(**{"dim": 8} | options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no CUDA device")
def test_the_accelerated_scan_says_what_it_needs() -> None:
    with refused(ValueError, "use_accelerated_scan", "CUDA", "accelerated-scan"):
        memory(use_accelerated_scan=True)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"gated_transition": True}, "gated_transition.*no effect.*batch_size=None"),
        (
            {"momentum_order": 2, "learned_combine_include_zeroth": True},
            "learned_combine_include_zeroth.*no effect.*learned_momentum_combine=False",
        ),
        ({"momentum_order": 2, "momentum": False}, "momentum_order=2.*no effect.*momentum=False"),
        (
            {"chunk_size": 1, "store_with_lookahead_value": True},
            "store_with_lookahead_value.*stores nothing.*only forgets",
        ),
    ],
)
def test_what_the_published_package_ignores_is_accepted_with_one_warning(options: dict[str, Any], words: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built = memory(**options)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=words):
        warnings.warn_explicit(caught[0].message, UserWarning, __file__, 1)
    assert caught[0].filename == __file__, "the warning points at who built the memory"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert built(torch.randn(1, 8, DIM))[0].shape == (1, 8, DIM)


# calls: (options, arguments, error, what the message has to say)
MASK = torch.ones(2, 6, dtype=torch.bool)
CALLS: list[tuple[dict[str, Any], dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({}, {"seq": seq(8)}, ValueError, ("seq", r"\(batch, tokens, dim\)", r"\(8,\)")),
    ({}, {"seq": seq(1, 2, 6, 8)}, ValueError, ("seq", r"\(batch, tokens, dim\)", r"\(1, 2, 6, 8\)")),
    ({}, {"seq": torch.zeros(())}, ValueError, ("seq", r"\(batch, tokens, dim\)")),
    ({}, {"seq": seq(2, 6, 7)}, ValueError, ("seq", "8 features", "7")),
    ({}, {"seq": seq(2, 0, 8)}, ValueError, ("seq", "empty", r"\(2, 0, 8\)")),
    ({}, {"seq": seq(0, 6, 8)}, ValueError, ("seq", "empty", r"\(0, 6, 8\)")),
    ({}, {"seq": seq().double()}, TypeError, ("seq", "float32", "float64")),
    ({}, {"seq": seq().long()}, TypeError, ("seq", "floating", "int64")),
    ({}, {"seq": [[1.0]]}, TypeError, ("seq", "tensor", "list")),
    ({}, {"seq": None}, TypeError, ("seq", "tensor", "NoneType")),
    ({"qkv_receives_diff_views": True}, {"seq": seq()}, ValueError, ("seq", "3 views", "2")),
    ({"qkv_receives_diff_views": True}, {"seq": seq(2, 2, 6, 8)}, ValueError, ("seq", "3 views", "2")),
    ({}, {"store_seq": seq(2, 5, 8)}, ValueError, ("store_seq", r"\(2, 6\)", r"\(2, 5\)")),
    ({}, {"store_seq": seq(1, 6, 8)}, ValueError, ("store_seq", r"\(2, 6\)", r"\(1, 6\)")),
    ({}, {"store_seq": seq(2, 6, 9)}, ValueError, ("store_seq", "8 features", "9")),
    ({}, {"store_seq": seq(2, 2, 6, 8)}, ValueError, ("store_seq", r"\(batch, tokens, dim\)")),
    ({}, {"store_seq": seq().double()}, TypeError, ("store_seq", "float32", "float64")),
    ({}, {"store_seq": "seq"}, TypeError, ("store_seq", "str")),
    (
        {"qkv_receives_diff_views": True},
        {"seq": seq(3, 2, 6, 8), "store_seq": seq()},
        ValueError,
        ("store_seq", r"\(2, 6\)", r"\(6,\)"),
    ),
    (
        {"qkv_receives_diff_views": True},
        {"seq": seq(3, 2, 6, 8), "store_seq": seq(3, 2, 6, 8)},
        ValueError,
        ("store_seq", "2 views", "3"),
    ),
    ({}, {"store_mask": MASK.float()}, TypeError, ("store_mask", "bool", "float32")),
    ({}, {"store_mask": MASK.tolist()}, TypeError, ("store_mask", "bool", "list")),
    ({}, {"store_mask": MASK[:, :5]}, ValueError, ("store_mask", r"\(2, 6\)", r"\(2, 5\)")),
    ({}, {"store_mask": MASK[0]}, ValueError, ("store_mask", r"\(2, 6\)", r"\(6,\)")),
    ({}, {"store_mask": MASK[..., None]}, ValueError, ("store_mask", r"\(2, 6\)", r"\(2, 6, 1\)")),
    ({}, {"ttt_batch_size": 6}, ValueError, ("ttt_batch_size", "6", "multiple", "4")),
    ({}, {"ttt_batch_size": 0}, ValueError, ("ttt_batch_size", "0", "positive")),
    ({}, {"ttt_batch_size": 4.0}, TypeError, ("ttt_batch_size", "4.0", "whole")),
    ({}, {"prev_weights": {}}, ValueError, ("prev_weights", "accept_weight_residual")),
    ({"accept_weight_residual": True}, {}, ValueError, ("prev_weights", "accept_weight_residual", "None")),
    ({"accept_weight_residual": True}, {"prev_weights": {}}, ValueError, ("prev_weights",)),
    ({"accept_weight_residual": True}, {"prev_weights": torch.zeros(3)}, (ValueError, TypeError), ("prev_weights",)),
    (
        {"accept_weight_residual": True},
        {"prev_weights": {"model.weights.0": torch.zeros(2, 2, 8, 32)}},
        ValueError,
        ("prev_weights", "norm.gamma"),
    ),
    ({}, {"state": 3}, TypeError, ("state", "int")),
    ({}, {"state": ({}, {})}, TypeError, ("state", "tuple")),
]


@pytest.mark.parametrize("options, call, error, words", CALLS, ids=shown)
def test_wrong_inputs_are_refused(
    options: dict[str, Any], call: dict[str, Any], error: type[Exception], words: tuple[str, ...]
) -> None:
    with refused(error, *words):
        memory(**options)(**{"seq": seq()} | call)


# a state of another module, or for another batch

OTHERS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"heads": 2, "dim_head": 8}, ("state", r"\(2, 8", r"\(4, 8")),
    ({"model": MemoryMLP(DIM, depth=3)}, ("state", "model.weights.2")),
    ({"default_model_kwargs": dict(depth=2, expansion_factor=2.0)}, ("state", r"\(2, 8, 32\)", r"\(2, 8, 16\)")),
    ({"momentum": False}, ("state", "norm.gamma")),
    ({"momentum_order": 2}, ("state", r"\(1, 2", r"\(2, 2")),
    ({"chunk_size": 8}, ("state", "fewer than 4")),
    ({"qkv_receives_diff_views": True}, ("state", r"\(2, 2, 2, 8\)")),
    ({"conv_size": 3}, ("state.tails.queries", "None", "conv_size", r"\(2, 2, 8\)")),
]


@pytest.mark.parametrize("options, words", OTHERS, ids=shown)
def test_a_state_of_another_memory_is_refused(options: dict[str, Any], words: tuple[str, ...]) -> None:
    other = memory(**options)
    _, state = other(seq(3, 2, 6, 8) if other.num_views else seq())
    with refused(ValueError, *words):
        memory()(seq(), state=state)


def test_a_state_of_another_batch_or_dtype_is_refused() -> None:
    _, state = memory()(seq())
    with refused(ValueError, "state", "3", "2"):
        memory()(seq(3, 6, 8), state=state)
    with refused(TypeError, "state", "float64", "float32"):
        memory().double()(seq().double(), state=state)


def test_a_state_of_another_width_is_refused() -> None:
    _, state = memory(dim=6)(seq(2, 5, 6))
    with refused(ValueError, "state", "6", "8"):
        memory()(seq(), state=state)


def test_a_state_that_is_not_at_a_chunk_border_is_refused() -> None:
    """Other chunk sizes may leave the same number of waiting tokens."""
    _, state = memory(chunk_size=3)(seq(2, 7, 8))
    with refused(ValueError, "state", "seq_index", "6", "4"):
        memory()(seq(), state=state)


def test_previous_weights_must_fit() -> None:
    residual = memory(accept_weight_residual=True)
    for options, given, words in (
        ({"heads": 2, "dim_head": 8}, seq(), ("prev_weights", r"\(4, 8", r"\(2, 8")),
        ({"model": MemoryMLP(DIM, depth=3)}, seq(), ("prev_weights", "model.weights.2")),
        ({}, seq(3, 6, 8), ("prev_weights", r"\(3, 8", r"\(2, 8")),
        ({}, seq(2, 3, 8), ("prev_weights", "chunks", "0 to 1", "0 to 0")),
    ):
        _, state = memory(**options)(given)
        with refused(ValueError, *words):
            residual(seq(), prev_weights=state)
        with refused(ValueError, *words):
            residual(seq(), prev_weights=state.updates)


@pytest.mark.parametrize(
    "call, error, words",
    [
        ({"seq": seq(2, 6, 7)}, ValueError, ("seq", "8 features", "7")),
        ({"mask": MASK.float()}, TypeError, ("mask", "bool")),
        ({"mask": MASK[:1]}, ValueError, ("mask", r"\(2, 6\)")),
        ({"seq_index": 3}, ValueError, ("seq_index", "3", "multiple", "4")),
        ({"seq_index": -4}, ValueError, ("seq_index", "-4")),
        ({"weights": {}}, ValueError, ("weights", "norm.gamma")),
        ({"past_state": ({}, {})}, ValueError, ("state", "norm.gamma")),
        ({"past_state": 3}, TypeError, ("past_state", "int")),
    ],
    ids=shown,
)
def test_storing_by_itself_refuses_too(call: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    with refused(error, *words):
        memory().store_memories(**{"seq": seq()} | call)


def test_reading_by_itself_refuses_too() -> None:
    built = memory()
    updates, _ = built.store_memories(seq(), return_surprises=False)
    with refused(ValueError, "seq", "8 features", "7"):
        built.retrieve_memories(seq(2, 6, 7), updates)
    with refused(ValueError, "weights", "2 chunks", "1 chunk"):
        built.retrieve_memories(seq(2, 9, 8), updates)
    with refused(ValueError, "weights", r"\(3, "):
        built.retrieve_memories(seq(3, 6, 8), updates)
    with refused(ValueError, "weights", "norm.gamma"):
        built.retrieve_memories(seq(), {})
    with refused((ValueError, TypeError), "weights"):
        built.retrieve_memories(seq(), torch.zeros(3))


@pytest.mark.parametrize("batch", [0, -1, 2.0])
def test_fresh_memories_need_a_batch(batch: Any) -> None:
    for make in (memory().init_weights, memory().init_momentum, memory().init_state):
        with refused((ValueError, TypeError), "batch", str(batch)):
            make(batch)


def test_reset_needs_one_boolean_per_row() -> None:
    built = memory()
    _, state = built(seq())
    with refused(TypeError, "rows", "bool"):
        built.reset(state, torch.tensor([0, 1]))
    with refused(ValueError, "rows", r"\(2,\)", r"\(3,\)"):
        built.reset(state, torch.tensor([True, False, True]))


@pytest.mark.parametrize("model", [m for m in memory_models.__dict__.values() if isinstance(m, type)], ids=shown)
@pytest.mark.parametrize("dim", [0, -2])
def test_memory_models_need_positive_sizes(model: type[nn.Module], dim: int) -> None:
    if model.__module__ != memory_models.__name__ or model is memory_models.LayerNorm:
        return
    more = {"model": nn.Identity()} if model is memory_models.ResidualNorm else {}
    has_no_depth = "Attention" in model.__name__ or model is memory_models.MemoryGLU
    more |= {} if has_no_depth or more else {"depth": 1}
    with refused(ValueError, "dim", str(dim), "positive"):
        model(dim, **more)


def test_a_failed_call_leaves_the_memory_usable() -> None:
    built, given = memory(), torch.randn(2, 6, DIM)
    before = built(given)[0]
    with refused(ValueError, "seq"):
        built(given[..., :3])
    assert torch.equal(built(given)[0], before)
