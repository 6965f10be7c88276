"""Models as folders, here or on the Hugging Face Hub: weights as safetensors, the constructor's arguments as JSON."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file
from torch import nn

from titans_pytorch.public_names import (
    OURS,
    class_of,
    is_of_torch,
    is_registered,
    named,
    public_name,
    register_named,
)

ARGUMENTS = "_constructor_arguments"


class Described:
    """Remembers what it was constructed with, as a mix-in before `nn.Module`; known to files if it is of this library.

    A class of yours is known to them after `public_names.register_named`.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith(OURS):
            register_named(cls.__name__, cls)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        try:
            bound = signature.bind_partial(instance, *args, **kwargs).arguments
        except TypeError:  # let __init__ say what is wrong
            bound = {}
        instance.__dict__[ARGUMENTS] = {name: value for name, value in bound.items() if name != "self"}
        return instance


class Pretrained(Described, PyTorchModelHubMixin):
    """`save_pretrained`, `from_pretrained` and `push_to_hub`.

    Modules among the arguments are described by class and arguments if they are of this library or parameter-free ones
    of torch.nn; others (and functions) have to be passed to `from_pretrained` once more, which says so, unless they are
    known by `public_names.register_named`.
    """

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        config = {name: described(value) for name, value in self.__dict__[ARGUMENTS].items()}
        self._hub_mixin_config = config
        return super().save_pretrained(save_directory, **{"config": config} | kwargs)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> Any:
        kwargs = {name: rebuilt(name, value) for name, value in kwargs.items()}
        return super()._from_pretrained(strict=strict, **kwargs)

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        weights = load_file(model_file, device=map_location)
        dtypes = {weight.dtype for weight in weights.values() if weight.is_floating_point()}
        if len(dtypes) == 1:
            model = model.to(dtypes.pop())
        model.to(map_location).load_state_dict(weights, strict=strict)
        return model.eval()


def described(value: Any) -> Any:
    """JSON for an argument, with public names; what cannot be described is left to whoever loads it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {key: described(each) for key, each in value.items()}
    if is_registered(value) and not isinstance(value, type):
        return {"named": public_name(value)}
    if (arguments := arguments_of(value)) is not None:
        return {"class": public_name(type(value)), "arguments": described(arguments)}
    if isinstance(value, (tuple, list)):
        return [described(each) for each in value]
    return {"to_be_passed": getattr(value, "__qualname__", type(value).__qualname__)}


def arguments_of(value: Any) -> dict[str, Any] | None:
    """What a module or a config can be constructed from once more; None: that is not known."""
    if is_registered(type(value)) and is_config(type(value)):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if not isinstance(value, nn.Module):
        return None
    if is_registered(type(value)) and ARGUMENTS in value.__dict__:
        arguments: dict[str, Any] = value.__dict__[ARGUMENTS]
        return arguments
    return _printed(value) if is_of_torch(type(value)) and not value.state_dict() else None


def is_config(kind: type) -> bool:
    """Whether a class is described by its fields."""
    return dataclasses.is_dataclass(kind)


def _printed(module: nn.Module) -> dict[str, Any]:
    """The arguments that a module of torch.nn prints: LeakyReLU(negative_slope=0.2)."""
    call = ast.parse(f"f({module.extra_repr()})", mode="eval").body
    keywords = call.keywords if isinstance(call, ast.Call) else []
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in keywords if keyword.arg is not None}


def rebuilt(name: str, value: Any) -> Any:
    """The argument that `described` has described."""
    if isinstance(value, list):
        return tuple(rebuilt(name, each) for each in value)
    if not isinstance(value, dict):
        return value
    if "to_be_passed" in value:
        raise ValueError(f"{name} must be passed to from_pretrained, it was saved with {value['to_be_passed']}")
    if value.keys() == {"named"}:
        return named(value["named"], name)
    if "class" in value and "arguments" in value:
        return class_of(value["class"], name)(**rebuilt(name, value["arguments"]))
    return {key: rebuilt(f"{name}[{key!r}]", each) for key, each in value.items()}


__all__ = ["Described", "Pretrained", "described", "rebuilt"]
