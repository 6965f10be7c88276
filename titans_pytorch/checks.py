"""Checks of arguments, with one voice: what was wrong, what came, what is allowed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def check_positive(**sizes: float | None) -> None:
    """Every given number is above zero; None is left alone."""
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, (int, float))):
            raise TypeError(f"{name} must be a number, got {size!r}")
        if size is not None and not size > 0:
            raise ValueError(f"{name} must be positive, got {size}")


def check_whole(**sizes: int | None) -> None:
    """Every given number is a whole one above zero; None is left alone."""
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
            raise TypeError(f"{name} must be a whole number, got {size!r}")
    check_positive(**sizes)


def check_chunk_size(chunk_size: Any) -> tuple[int, int]:
    """-> (retrieve, store)"""
    pair = (chunk_size, chunk_size) if isinstance(chunk_size, int) else chunk_size
    if not isinstance(pair, (tuple, list)):
        raise TypeError(f"chunk_size must be a whole number or a pair (retrieve, store), got {chunk_size!r}")
    if len(pair) != 2:
        raise ValueError(f"chunk_size must be a whole number or a pair (retrieve, store), got {chunk_size!r}")
    check_whole(**{"chunk_size for reading": pair[0], "chunk_size for storing": pair[1]})
    return pair[0], pair[1]


def check_multiple(name: str, size: int | None, chunk: int) -> None:
    if size is not None and size % chunk != 0:
        raise ValueError(f"{name} must be a multiple of the store chunk size {chunk}, got {size}")


def check_dim_head(dim: int, dim_head: int, heads: int) -> None:
    if heads == 1 and dim_head != dim:
        raise ValueError(f"dim_head must equal dim ({dim}) with one head, got {dim_head}; use heads > 1 for another")


def check_momentum(
    momentum: bool,
    momentum_order: int,
    learned_momentum_combine: bool,
    learned_combine_include_zeroth: bool,
    init_momentum_bias: float | None,
) -> None:
    """Options that contradict are errors; the ones that the published package ignores are warnings."""
    if learned_momentum_combine and not (momentum and momentum_order > 1):
        got = f"momentum={momentum} and momentum_order={momentum_order}"
        raise ValueError(f"learned_momentum_combine needs momentum of more than one order, got {got}")
    if init_momentum_bias is not None and not momentum:
        raise ValueError(f"init_momentum_bias needs momentum, got {init_momentum_bias} with momentum=False")
    if momentum_order > 1 and not momentum:
        warn_ignored(f"momentum_order={momentum_order}", "momentum=False")
    if learned_combine_include_zeroth and not learned_momentum_combine:
        warn_ignored("learned_combine_include_zeroth=True", "learned_momentum_combine=False")


def warn_ignored(option: str, because: str) -> None:
    warnings.warn(f"{option} has no effect with {because}", UserWarning, stacklevel=6)


def check_sequence(name: str, seq: Any, *, views: int | None, dim: int, dtype: torch.dtype) -> None:
    """seq: (b n dim) or one token (b dim), with views (views b n dim) or (views b dim)"""
    pattern = "(batch, tokens, dim) or (batch, dim)" if views is None else f"({views} views, batch, tokens, dim)"
    if not isinstance(seq, Tensor):
        raise TypeError(f"{name} must be a tensor {pattern}, got {type(seq).__name__}")
    if seq.ndim - (views is not None) not in (2, 3):
        raise ValueError(f"{name} must have the shape {pattern}, got {tuple(seq.shape)}")
    if views is not None and seq.shape[0] != views:
        raise ValueError(f"{name} must have {views} views along its first axis, got {seq.shape[0]}: {tuple(seq.shape)}")
    if seq.shape[-1] != dim:
        raise ValueError(
            f"{name} must have {dim} features along its last axis, got {seq.shape[-1]}: {tuple(seq.shape)}"
        )
    if 0 in seq.shape:
        raise ValueError(f"{name} must not be empty, got {tuple(seq.shape)}")
    if not seq.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {seq.dtype}")
    if seq.dtype != dtype and not torch.is_autocast_enabled(seq.device.type):
        raise TypeError(f"{name} must have the dtype of the module, {dtype}, got {seq.dtype} (or use autocast)")


def check_same_tokens(name: str, given: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(given) != tuple(expected):
        raise ValueError(f"{name} must have the batch and length of seq, {tuple(expected)}, got {tuple(given)}")


def check_mask(name: str, mask: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a boolean tensor, got {got}")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} must have the shape (batch, tokens) = {tuple(shape)}, got {tuple(mask.shape)}")


def check_weights(name: str, weights: Any, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """weights: a mapping name -> tensor; shapes: what each must have"""
    if not isinstance(weights, Mapping):
        raise TypeError(f"{name} must be a mapping of names to weights, got {type(weights).__name__}")
    if set(weights) != set(shapes):
        raise ValueError(f"{name} must hold the weights {sorted(shapes)} of this module, got {sorted(weights)}")
    for key, shape in shapes.items():
        weight = weights[key]
        if tuple(weight.shape) != tuple(shape):
            raise ValueError(f"{name}[{key!r}] must have the shape {tuple(shape)}, got {tuple(weight.shape)}")
        if weight.dtype != dtype:
            raise TypeError(f"{name}[{key!r}] must have the dtype {dtype}, got {weight.dtype}")


def check_batching(batch_size: int | None, chunk: int, gated_transition: bool, max_weight_growth: float | None) -> None:
    check_multiple("batch_size", batch_size, chunk)
    check_positive(max_weight_growth=max_weight_growth)
    if max_weight_growth is not None and max_weight_growth < 1:
        raise ValueError(f"max_weight_growth must be at least 1 (times the initial memory), got {max_weight_growth}")
    if gated_transition and batch_size is None:
        warn_ignored("gated_transition=True", "batch_size=None (unless a call sets ttt_batch_size)")


def check_chunking(chunk: int, attn_pool_chunks: bool, looks_ahead: bool) -> None:
    for name, is_on in (("attn_pool_chunks", attn_pool_chunks), ("store_with_lookahead_value", looks_ahead)):
        if is_on and chunk == 1:
            raise ValueError(f"{name} needs a store chunk size of at least 2 tokens, got 1")


def check_scan(use_accelerated_scan: bool) -> None:
    if not use_accelerated_scan:
        return
    has_package = importlib.util.find_spec("accelerated_scan") is not None
    if not (has_package and torch.cuda.is_available()):
        raise ValueError(
            "use_accelerated_scan needs a CUDA device and the package accelerated-scan, "
            f"got CUDA {'available' if torch.cuda.is_available() else 'not available'} "
            f"and the package {'installed' if has_package else 'not installed'}"
        )


def check_batch(name: str, given: int, expected: int) -> None:
    if given != expected:
        raise ValueError(f"{name} must be of the input's batch size {expected}, got one of {given}")


def check_waiting(segment: Tensor, *, views: int | None, dim: int, chunk: int) -> None:
    """The waiting tokens of a state fit a module."""
    if segment.ndim != (3 if views is None else 4) or segment.shape[-1] != dim or segment.shape[-2] >= chunk:
        expected = f"({'' if views is None else '2 views, '}batch, fewer than {chunk} tokens, {dim})"
        raise ValueError(f"state.cache_store_segment must have the shape {expected}, got {tuple(segment.shape)}")


def check_enough_chunks(given: int, needed: int) -> None:
    if given < needed:
        raise ValueError(
            f"weights must hold the memory after {needed} chunks to read this sequence, got {given} chunks"
        )


def check_number(**values: float | None) -> None:
    """Every given value is a number of any sign; None is left alone."""
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(f"{name} must be a number, got {value!r}")


def check_callable(**functions: Callable[..., Any] | None) -> None:
    """Every given value can be called; None is left alone."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be callable, got {function!r} ({type(function).__name__})")


def check_activation(activation: Any) -> None:
    if activation is not None and not isinstance(activation, torch.nn.Module):
        raise TypeError(
            f"activation must be an nn.Module such as nn.SiLU(), got {activation!r} ({type(activation).__name__})"
        )


def check_elementwise(name: str, transform: Callable[[Tensor], Tensor] | None) -> None:
    if transform is None:
        return
    got = transform(torch.zeros(2, 3))
    if not isinstance(got, Tensor) or got.shape != (2, 3):
        shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
        raise ValueError(f"{name} must be elementwise: gave the shape (2, 3), got {shape}")


def check_stored_before(name: str, seq_index: Any, chunk: int) -> None:
    """A number of tokens that whole chunks can have."""
    if isinstance(seq_index, bool) or not isinstance(seq_index, int) or seq_index < 0 or seq_index % chunk:
        raise ValueError(f"{name} must be a multiple of the store chunk size {chunk}, at least 0, got {seq_index!r}")


def check_past_state(past_state: Any) -> None:
    if not isinstance(past_state, (tuple, list)) or len(past_state) != 2:
        raise TypeError(f"past_state must be a pair (weights, momenta), got {type(past_state).__name__}")


def checked_trajectory(name: str, weights: Any, names: Iterable[str]) -> Mapping[str, Tensor]:
    """Something that may be weights over chunks."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"{name} must be a mapping of names to weights, got {type(weights).__name__}")
    if set(weights) != set(names) or not all(isinstance(w, Tensor) and w.ndim > 0 for w in weights.values()):
        raise ValueError(f"{name} must hold the weights {sorted(names)} of this module, got {sorted(weights)}")
    return weights


def check_counts(**counts: int) -> None:
    """Every number is whole and at least zero."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name} must be a whole number, got {count!r}")
        if count < 0:
            raise ValueError(f"{name} must be at least 0, got {count}")


def check_even(**sizes: int) -> None:
    for name, size in sizes.items():
        if size % 2:
            raise ValueError(f"{name} must be even, since features are turned in pairs, got {size}")


def check_options(name: str, given: Any, allowed: dict[str, tuple[type, ...]]) -> None:
    """given: a mapping whose keys and types are among `allowed`"""
    if not hasattr(given, "items"):
        raise TypeError(f"{name} must be a mapping, got {type(given).__name__}")
    for key, value in given.items():
        if key not in allowed:
            raise ValueError(f"{name} must be among {sorted(allowed)}, got {key!r}")
        if not isinstance(value, allowed[key]):
            raise TypeError(f"{name}[{key!r}] must be of {[t.__name__ for t in allowed[key]]}, got {value!r}")


def check_tokens(name: str, seq: Any, *, dim: int, dtype: torch.dtype) -> None:
    """seq: (b n dim), not empty"""
    if isinstance(seq, Tensor) and seq.ndim != 3:
        raise ValueError(f"{name} must have the shape (batch, tokens, {dim}), got {tuple(seq.shape)}")
    check_sequence(name, seq, views=None, dim=dim, dtype=dtype)


def check_shape(name: str, given: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
    if tuple(given.shape) != tuple(shape):
        raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(given.shape)}")


def check_widths(name: str, given: Any) -> tuple[int, ...]:
    """At least two whole numbers above zero."""
    if isinstance(given, (int, str)) or not hasattr(given, "__iter__"):
        raise TypeError(f"{name} must be a sequence of at least two widths, got {given!r}")
    widths = tuple(given)
    if len(widths) < 2:
        raise ValueError(f"{name} must have at least two widths, got {widths}")
    check_whole(**{f"{name}[{i}]": width for i, width in enumerate(widths)})
    return widths


def check_not_supported(**options: Any) -> None:
    for name, value in options.items():
        if value:
            raise ValueError(f"{name} is not supported, got {value!r}, allowed is False")


def check_layers(name: str, given: Any, depth: int) -> tuple[int, ...]:
    """Numbers of layers, from 1; None: all of them."""
    if given is None:
        return tuple(range(1, depth + 1))
    if isinstance(given, (int, str)) or not hasattr(given, "__iter__"):
        raise TypeError(f"{name} must be a sequence of layer numbers, got {given!r}")
    layers = tuple(given)
    for number in layers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must hold whole numbers, got {number!r}")
        if not 1 <= number <= depth:
            raise ValueError(f"{name} must hold numbers from 1 to the depth {depth}, got {number}")
    return layers


def check_choice(name: str, given: Any, allowed: tuple[Any, ...]) -> None:
    if given not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {given!r}")


def check_reserved(name: str, given: Any, reserved: tuple[str, ...], owner: str = "transformer") -> dict[str, Any]:
    """A mapping of further arguments without those that are set elsewhere."""
    if given is not None and not hasattr(given, "items"):
        raise TypeError(f"{name} must be a mapping, got {type(given).__name__}")
    if taken := sorted(set(given or {}) & set(reserved)):
        raise ValueError(f"{name} must leave {taken} to the arguments of the {owner}, got {dict(given)}")
    return dict(given or {})


def check_at_least(name: str, given: Any, smallest: int, what: str) -> None:
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{name} must be a whole number, got {given!r}")
    if given < smallest:
        raise ValueError(f"{name} must be at least {what} ({smallest}), got {given}")


def check_ids(name: str, ids: Any, num_tokens: int | None, at_least: int) -> None:
    """ids: (b n) of at least so many tokens below num_tokens; None: an embedding of the user's knows what it takes"""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor of token ids (batch, tokens), got {type(ids).__name__}")
    if ids.ndim != 2 and (num_tokens is not None or ids.ndim < 2):
        raise ValueError(f"{name} must have the shape (batch, tokens), got {tuple(ids.shape)}")
    if ids.shape[0] == 0 or ids.shape[1] < at_least:
        raise ValueError(f"{name} must have at least {at_least} token(s) in at least one row, got {tuple(ids.shape)}")
    if num_tokens is None:
        return
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be of dtype int64 or int32, got {ids.dtype}")
    # A look at the values would hold up an accelerator; there the embedding itself complains.
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = ids.aminmax()
        if low < 0 or high >= num_tokens:
            raise ValueError(f"{name} must be from 0 to {num_tokens - 1}, got ids from {int(low)} to {int(high)}")


def check_switches(**switches: Any) -> None:
    for name, given in switches.items():
        if not isinstance(given, bool):
            raise TypeError(f"{name} must be True or False, got {given!r}")


def check_exclusive(**options: bool) -> None:
    """At most one of them is chosen."""
    if len(chosen := [name for name, is_chosen in options.items() if is_chosen]) > 1:
        raise ValueError(f"{' and '.join(chosen)} exclude each other, got both: choose one")


def check_needed(option: str, is_on: bool, **needed: bool) -> None:
    for name, is_given in needed.items():
        if is_on and not is_given:
            raise ValueError(f"{option} needs {name}=True, got {name}={is_given}")


def check_tail(name: str, tail: Tensor | None, shape: tuple[int, ...] | None) -> None:
    """What a convolution still sees; None without one."""
    got = None if tail is None else tuple(tail.shape)
    expected = None if shape is None else tuple(shape)
    if got != expected:
        raise ValueError(f"{name} must have the shape {expected} of this module's conv_size, got {got}")


def check_divides(name: str, size: int, whole_name: str, whole: int) -> None:
    if whole % size:
        raise ValueError(f"{whole_name} must be a multiple of {name} ({size}), got {whole}; or give dim_head")
