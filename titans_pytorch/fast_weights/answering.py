"""Reaching the matrix products of any memory model.

A memory model is run with its own parameters standing in as names only: while `Answer` is active, every product of
something with a registered matrix is handed to a function, and every registered vector is replaced by another tensor.
The mode is local to its thread and leaves the module alone, so one module can be used from many threads at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from titans_pytorch.fast_weights import norms

Product = Callable[[str, Tensor, bool], Tensor]
"""(name, x, is_transposed) -> x @ weight, or x @ weight.T;  x: (r n c i)"""

PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__}
TRANSPOSES = {torch.t, torch.Tensor.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__}  # type: ignore[attr-defined]
CASTS = {torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.contiguous}
METADATA = {
    getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.numel, torch.Tensor.is_floating_point}


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.layer_norm`, as often differentiable as one likes; its gain may be another one for every chunk."""
    num_axes = len(normalized_shape)
    if num_axes == 0 or input.shape[-num_axes:] != tuple(normalized_shape):
        return F.layer_norm(input, list(normalized_shape), eps=eps)  # which says what is wrong
    x = norms.layer_norm(input, num_axes, eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """`F.rms_norm`, whose gain may be another one for every chunk."""
    x = F.rms_norm(input, normalized_shape, eps=eps)
    return x if weight is None else x * weight


NORMS = {F.layer_norm: layer_norm, F.rms_norm: rms_norm}
"""What is called instead of torch's"""


class UnknownUse(Exception):
    """A memory model uses a matrix in a way that is not a plain product; the general engine can still run it."""


class Answer(TorchFunctionMode):
    """Answers `x @ weight` for the registered matrices and lends every registered vector another value.

    parameters: the model's own, by name; product: what a matrix product is answered with;
    vectors: the values of the parameters with fewer than two axes, shaped so that they broadcast with (r n c d)
    """

    def __init__(self, parameters: Mapping[str, Tensor], product: Product, vectors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.product = product
        self.vectors = {id(parameters[name]): value for name, value in vectors.items()}
        self.matrices = {id(p): (name, False) for name, p in parameters.items() if name not in vectors}
        self.aliases: list[Tensor] = []  # kept alive, so that no other tensor takes over an identity

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return func(*args, **kwargs)
        for arg in (*args, *kwargs.values()):
            if id(arg) in self.matrices:
                return self.multiply(func, args, kwargs)
            if id(arg) in self.vectors:
                return self.substitute(func, args, kwargs)
            if isinstance(arg, (tuple, list)) and any(id(a) in self.matrices or id(a) in self.vectors for a in arg):
                raise UnknownUse(f"{func.__name__} of a list of memory weights")
        return NORMS.get(func, func)(*args, **kwargs)

    def multiply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A registered matrix is among the arguments."""
        if func is F.linear and not kwargs.keys() - {"bias"} and id(args[0]) not in self.matrices:
            x, weight, bias = (*args, kwargs.get("bias"))[:3]
            out = self.answered(x, weight, flip=True)
            return out if bias is None else out + self.vectors.get(id(bias), bias)
        if func in PRODUCTS and not kwargs and len(args) == 2:
            first, second = args if func is not torch.Tensor.__rmatmul__ else args[::-1]
            if id(first) not in self.matrices:
                return self.answered(first, second, flip=False)
            if id(second) not in self.matrices:
                return self.answered(second.mT, first, flip=True).mT
        if func is torch.einsum and len(args) == 3:
            return self.einsum(*args)
        is_flip = func in (torch.transpose, torch.Tensor.transpose) and sorted(i % 2 for i in args[1:]) == [0, 1]
        if is_flip or func in TRANSPOSES or func in CASTS:
            name, is_transposed = self.matrices[id(args[0])]
            return self.alias(func(*args, **kwargs), name, is_transposed ^ (func not in CASTS))
        raise UnknownUse(f"{func.__name__} of a memory weight")

    def substitute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A registered vector is among the arguments."""
        swapped = {name: self.vectors.get(id(value), value) for name, value in kwargs.items()}
        return NORMS.get(func, func)(*(self.vectors.get(id(arg), arg) for arg in args), **swapped)

    def einsum(self, equation: str, x: Tensor, y: Tensor) -> Tensor:
        """An einsum that is a product of tokens with one matrix, at any axis of the tokens."""
        terms, _, out = equation.replace(" ", "").partition("->")
        left, right = terms.split(",")
        if id(x) in self.matrices:
            left, right, x, y = right, left, y, x
        summed, kept = set(right) - set(out), set(right) & set(out)
        is_product = len(right) == 2 and len(summed) == len(kept) == 1 and id(x) not in self.matrices
        letter, free = "".join(summed), "".join(kept)
        if not is_product or left.count(letter) != 1 or left.replace(letter, free) != out:
            raise UnknownUse(f"einsum {equation!r} of a memory weight")
        axis = left.index(letter) if "." not in left[: left.index(letter)] else left.index(letter) - len(left)
        answered = self.answered(x.movedim(axis, -1), y, flip=right[0] == free)
        return answered.movedim(-1, axis)

    def answered(self, x: Tensor, weight: Tensor, *, flip: bool) -> Tensor:
        name, is_transposed = self.matrices[id(weight)]
        return self.product(name, x, is_transposed ^ flip)

    def alias(self, view: Tensor, name: str, is_transposed: bool) -> Tensor:
        self.aliases.append(view)
        self.matrices[id(view)] = (name, is_transposed)
        return view


class Substitute(TorchFunctionMode):
    """Lends every registered parameter another value, whatever the model does with it; for use under `vmap`."""

    def __init__(self, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = {id(parameters[name]): value for name, value in values.items()}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        lent = {name: self.lend(value) for name, value in (kwargs or {}).items()}
        return NORMS.get(func, func)(*(self.lend(arg) for arg in args), **lent)

    def lend(self, arg: Any) -> Any:
        if isinstance(arg, (tuple, list)):
            return type(arg)(self.lend(a) for a in arg)
        return self.values.get(id(arg), arg)
