"""Models as folders, here or on the Hugging Face Hub: weights as safetensors, the constructor's arguments as JSON."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file
from torch import nn

ARGUMENTS = "_constructor_arguments"


class Described:
    """Remembers what it was constructed with, as a mix-in before `nn.Module`."""

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
    of torch.nn; others (and functions) have to be passed to `from_pretrained` once more, which says so.
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
    """JSON for an argument; what cannot be described is left to whoever loads it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {key: described(each) for key, each in value.items()}
    if is_config(type(value)):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"class": f"{type(value).__module__}.{type(value).__qualname__}", "arguments": described(fields)}
    if isinstance(value, (tuple, list)):
        return [described(each) for each in value]
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, nn.Module) and kind.__module__.startswith("titans_pytorch.") and ARGUMENTS in value.__dict__:
        return {"class": name, "arguments": described(value.__dict__[ARGUMENTS])}
    if isinstance(value, nn.Module) and kind.__module__.startswith("torch.nn.") and not value.state_dict():
        return {"class": name, "arguments": _printed(value)}
    return {"to_be_passed": name if isinstance(value, nn.Module) else getattr(value, "__qualname__", name)}


def is_config(kind: type) -> bool:
    """A dataclass of this library."""
    return dataclasses.is_dataclass(kind) and kind.__module__.startswith("titans_pytorch.")


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
    if "class" in value and "arguments" in value:
        module, _, kind = value["class"].rpartition(".")
        if module.split(".")[0] not in ("titans_pytorch", "torch"):
            raise ValueError(f"{name} must be of titans_pytorch or torch.nn, got {value['class']}")
        found = getattr(import_module(module), kind)
        if not (isinstance(found, type) and (issubclass(found, nn.Module) or is_config(found))):
            raise ValueError(f"{name} must be a module or a config, got {value['class']}")
        return found(**rebuilt(name, value["arguments"]))
    return {key: rebuilt(f"{name}[{key!r}]", each) for key, each in value.items()}


__all__ = ["Described", "Pretrained", "described", "rebuilt"]
