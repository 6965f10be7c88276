"""What was memorised, as a file: memory states and caches of transformers as versioned safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, device

from titans_pytorch.mac.cache import MACCache
from titans_pytorch.memory.state import NeuralMemState, Updates
from titans_pytorch.public_names import public_name, state_kind
from titans_pytorch.ragged.state import RaggedState
from titans_pytorch.titans.state import TitansState

FORMAT, VERSION = "titans_pytorch.state", 2  # 1: the blocks of all Titans models had one kind of state
State = NeuralMemState | MACCache | TitansState | RaggedState
KINDS = "a NeuralMemState, a MACCache, a TitansState or a RaggedState"


def save_state(state: State, path: str | Path) -> None:
    """Write the state of a memory or a model, or a cache of a transformer, to one file.  `updates` begin anew."""
    if not isinstance(state, State):
        got = type(state).__name__
        raise TypeError(f"state must be {KINDS}, got {got}")
    tensors: dict[str, Tensor] = {}
    layout = json.dumps(_layout(state, "state", tensors))
    save_file(tensors, path, metadata={"format": FORMAT, "version": str(VERSION), "layout": layout})


def load_state(path: str | Path, device: str | device = "cpu") -> State:
    """What `save_state` has written, on a device."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        about = file.metadata() or {}
        if about.get("format") != FORMAT:
            raise ValueError(f"{path} must be a file of save_state, got one of format {about.get('format')!r}")
        if int(about["version"]) > VERSION:
            raise ValueError(
                f"{path} must be of version {VERSION} or older, got {about['version']}: update the library"
            )
        state = _restored(json.loads(about["layout"]), file)
    if not isinstance(state, State):
        raise ValueError(f"{path} must hold {KINDS}, got {type(state).__name__}")
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


def _restored(layout: Any, file: Any) -> Any:
    """The tree that `_layout` has described, of a file's tensors."""
    if not isinstance(layout, dict):
        return layout
    ((what, content), *more) = layout.items()
    if what == "tensor":
        return file.get_tensor(content)
    if what == "tuple":
        return tuple(_restored(each, file) for each in content)
    if what == "dict":
        return {key: _restored(each, file) for key, each in content.items()}
    if what == "next_chunk":
        return Updates(content, 0, {}, [])
    new = state_kind(content)(**{key: _restored(each, file) for key, each in more[0][1].items()})
    return new.settled() if hasattr(new, "settled") else new
