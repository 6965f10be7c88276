"""What was memorised, as a file or bytes: memory states and caches of transformers as versioned safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor, device, nn

from titans_pytorch.initialization import whole_of
from titans_pytorch.mac.cache import MACCache
from titans_pytorch.memory.state import NeuralMemState, Updates
from titans_pytorch.public_names import public_name, state_kind
from titans_pytorch.ragged.state import RaggedState
from titans_pytorch.titans.state import TitansState
from titans_pytorch.tnt_memory import TNTState

FORMAT, VERSION = "titans_pytorch.state", 2  # 1: the blocks of all Titans models had one kind of state
State = NeuralMemState | TNTState | MACCache | TitansState | RaggedState
SAMPLED = 64
"""Values of each parameter that a fingerprint looks at: training changes nearly all"""
KINDS = "a NeuralMemState, a TNTState, a MACCache, a TitansState or a RaggedState"


def save_state(state: State, path: str | Path, model: nn.Module | None = None) -> None:
    """Write the state of a memory or a model, or a cache of a transformer, to one file.  `updates` begin anew.

    model: whose state it is; then `load_state` can tell whether it is loaded for the same weights
    """
    tensors, about = written(state, model)
    save_file(tensors, path, metadata=about)


def load_state(path: str | Path, device: str | device = "cpu", model: nn.Module | None = None) -> State:
    """What `save_state` has written, on a device.  model: for which it is; it must be the one that it was saved with"""
    with safe_open(path, framework="pt", device=str(device)) as file:
        return read_back(file.metadata() or {}, file.get_tensor, str(path), model)


def state_to_bytes(state: State, model: nn.Module | None = None) -> bytes:
    """What `save_state` writes, as bytes for a database or another process."""
    tensors, about = written(state, model)
    return save(tensors, metadata=about)


def state_from_bytes(data: bytes, device: str | device = "cpu", model: nn.Module | None = None) -> State:
    """What `state_to_bytes` has written, on a device; arguments as of `load_state`."""
    tensors = load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return read_back(header.get("__metadata__", {}), lambda name: tensors[name].to(device), "data", model)


def fingerprint(model: nn.Module) -> str:
    """A name of a model with its weights: of what parameters are called, their shapes, and 64 values of each."""
    parts, values = [], []
    for name, parameter in sorted(model.named_parameters()):
        whole = whole_of(parameter).flatten()
        parts.append(f"{name} {tuple(parameter.shape)} {parameter.dtype}")
        places = torch.linspace(0, max(len(whole) - 1, 0), min(len(whole), SAMPLED), device=whole.device).long()
        values.append(whole[places].double())
    drawn = torch.cat(values).cpu() if values else torch.zeros(0)
    return sha256("\n".join((*parts, *map(repr, drawn.tolist()))).encode()).hexdigest()


def written(state: State, model: nn.Module | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state as named tensors, and what is said of them."""
    if not isinstance(state, State):
        raise TypeError(f"state must be {KINDS}, got {type(state).__name__}")
    tensors: dict[str, Tensor] = {}
    about = {"format": FORMAT, "version": str(VERSION), "layout": json.dumps(_layout(state, "state", tensors))}
    return tensors, about if model is None else about | {"model": fingerprint(model)}


def read_back(about: dict[str, str], tensor: Callable[[str], Tensor], source: str, model: nn.Module | None) -> State:
    """The state that `written` has described.  tensor: gives those of a name"""
    if about.get("format") != FORMAT:
        raise ValueError(f"{source} must be a file of save_state, got one of format {about.get('format')!r}")
    if int(about["version"]) > VERSION:
        raise ValueError(f"{source} must be of version {VERSION} or older, got {about['version']}: update the library")
    if model is not None and (own := fingerprint(model)) != (saved := about.get("model")):
        what = "one that was saved without a model" if saved is None else f"one of a model {saved[:12]}"
        raise ValueError(f"{source} must be a state of this model with these weights, {own[:12]}, got {what}")
    state = _restored(json.loads(about["layout"]), tensor)
    if not isinstance(state, State):
        raise ValueError(f"{source} must hold {KINDS}, got {type(state).__name__}")
    return state


def _layout(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a tree whose tensors go to `tensors`: what is a dict here holds one thing, by its form."""
    if tree is None or isinstance(tree, int):
        return tree
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach().contiguous().clone()
        return {"tensor": name}
    if isinstance(tree, Updates):
        return {"next_chunk": tree.first_chunk + tree.num_chunks}
    if isinstance(tree, dict):
        return {"dict": _each(tree.items(), name, tensors)}
    if hasattr(tree, "_asdict"):
        return {"kind": public_name(type(tree)), "fields": _each(tree._asdict().items(), name, tensors)}
    return {"tuple": list(_each(enumerate(tree), name, tensors).values())}


def _each(items: Iterable[tuple[object, Any]], name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The layouts of parts, by what they are called."""
    return {str(key): _layout(value, f"{name}.{key}", tensors) for key, value in items}


def _restored(layout: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The tree that `_layout` has described, of tensors by name."""
    if not isinstance(layout, dict):
        return layout
    ((what, content), *more) = layout.items()
    if what == "tensor":
        return tensor(content)
    if what == "tuple":
        return tuple(_restored(each, tensor) for each in content)
    if what == "dict":
        return {key: _restored(each, tensor) for key, each in content.items()}
    if what == "next_chunk":
        return Updates(content, 0, {}, [])
    new = state_kind(content)(**{key: _restored(each, tensor) for key, each in more[0][1].items()})
    return new.settled() if hasattr(new, "settled") else new
