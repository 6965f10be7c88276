"""What was memorised, as a file: memory states and caches of transformers as versioned safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, device

from titans_pytorch.attention.key_values import KeyValueCache, KeyValues
from titans_pytorch.mac.cache import MACCache
from titans_pytorch.memory.convolution import Tails
from titans_pytorch.memory.state import NeuralMemState, QueryTail, ReadingGroup, Updates
from titans_pytorch.titans.mixers import MIXERS
from titans_pytorch.titans.mixers.mac import Segment
from titans_pytorch.titans.state import LayerState, SegmentState, TitansState

FORMAT, VERSION = "titans_pytorch.state", 1
KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        *(NeuralMemState, ReadingGroup, Tails, QueryTail),
        *(MACCache, KeyValueCache),
        *(TitansState, LayerState, SegmentState, Segment, KeyValues),
    )
}


def kinds() -> dict[str, Any]:
    """Everything that has a name in a file, with the states of all mixers there are by now."""
    return KINDS | {mixer.State.__name__: mixer.State for mixer in MIXERS.values()}


def save_state(state: NeuralMemState | MACCache | TitansState, path: str | Path) -> None:
    """Write the state of a memory or a model, or a cache of a transformer, to one file.  `updates` begin anew."""
    if not isinstance(state, (NeuralMemState, MACCache, TitansState)):
        got = type(state).__name__
        raise TypeError(f"state must be a NeuralMemState, a MACCache or a TitansState, got {got}")
    tensors: dict[str, Tensor] = {}
    layout = json.dumps(_layout(state, "state", tensors))
    save_file(tensors, path, metadata={"format": FORMAT, "version": str(VERSION), "layout": layout})


def load_state(path: str | Path, device: str | device = "cpu") -> Any:
    """What `save_state` has written, on a device."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        about = file.metadata() or {}
        if about.get("format") != FORMAT:
            raise ValueError(f"{path} must be a file of save_state, got one of format {about.get('format')!r}")
        if int(about["version"]) > VERSION:
            raise ValueError(
                f"{path} must be of version {VERSION} or older, got {about['version']}: update the library"
            )
        return _restored(json.loads(about["layout"]), file)


def _layout(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a tree whose tensors go to `tensors`: what is a dict here holds one other thing, by its kind."""
    if tree is None or isinstance(tree, int):
        return tree
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach().contiguous().clone()
        return {"tensor": name}
    if isinstance(tree, Updates):
        return {"next_chunk": tree.first_chunk + tree.num_chunks}
    if type(tree).__name__ in kinds():
        return {"kind": type(tree).__name__, "fields": _each(tree._asdict().items(), name, tensors)}
    if isinstance(tree, dict):
        return {"dict": _each(tree.items(), name, tensors)}
    return {"tuple": list(_each(enumerate(tree), name, tensors).values())}


def _each(items: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {str(key): _layout(value, f"{name}.{key}", tensors) for key, value in items}


def _restored(layout: Any, file: Any) -> Any:
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
        return content
    fields = {key: _restored(each, file) for key, each in more[0][1].items()}
    if content == NeuralMemState.__name__:
        fields["updates"] = Updates(fields["updates"], 0, fields["states"][0], [])
    return kinds()[content](**fields)
