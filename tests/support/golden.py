"""Golden vectors of the published package (`parity/NAME.safetensors`): what a file holds, how far an answer is off."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor, nn

from titans_pytorch import memory_models
from titans_pytorch.attention import rotary

FOLDER = Path(__file__).parent.parent / "parity"
MODEL_ARGUMENTS = ("model", "neural_memory_model")


@dataclass(frozen=True)
class Golden:
    name: str
    kind: str  # the class that was run
    kwargs: dict[str, Any]  # its arguments, decoded
    call: dict[str, Any]  # how it was called
    memory_parameters: list[str]  # the names behind `memory_model_parameters.{i}`
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]
    prev_state: dict[str, Tensor]  # of the previous memory layer, empty where there is none


def names(prefix: str = "") -> list[str]:
    """All golden vectors whose name starts with `prefix` ("nm_", "mac_", "attn_")."""
    return sorted(path.stem for path in FOLDER.glob(f"{prefix}*.safetensors"))


def load(name: str) -> Golden:
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        about = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no mapping

    def under(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

    return Golden(
        name=name,
        kind=about["kind"],
        kwargs={key: decode(key, value) for key, value in json.loads(about["kwargs"]).items()},
        call=json.loads(about["call"]),
        memory_parameters=json.loads(about["memory_parameters"]),
        state=under("state/"),
        inputs=under("in/"),
        outputs=under("out/"),
        grads=under("grad/"),
        prev_state=under("prev_state/"),
    )


def decode(key: str, value: Any) -> Any:
    """JSON for modules: an activation is the name of a torch module, a memory model `[class, arguments]`."""
    if key == "activation":
        return getattr(nn, value)()
    if key in MODEL_ARGUMENTS:
        class_name, arguments = value
        return getattr(memory_models, class_name)(**arguments).double()
    return tuple(value) if isinstance(value, list) else value


def output_errors(golden: Golden, got: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative L2 error of every output of the file."""
    return {key: relative_error(got[key], expected) for key, expected in golden.outputs.items()}


def gradient_errors(golden: Golden, got: Mapping[str, Tensor], *, floor: float = 1e-6) -> dict[str, float]:
    """Relative L2 error of every gradient of the file; one below `floor` times the largest is measured against that."""
    smallest = floor * max(expected.norm().item() for expected in golden.grads.values())
    return {key: relative_error(got[key], expected, smallest) for key, expected in golden.grads.items()}


def relative_error(got: Tensor, expected: Tensor, smallest: float = 0.0) -> float:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise AssertionError(f"expected {expected.dtype} {tuple(expected.shape)}, got {got.dtype} {tuple(got.shape)}")
    error, scale = (got - expected).norm().item(), max(expected.norm().item(), smallest)
    return error if scale == 0 else error / scale


@pytest.fixture
def published_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary frequencies rounded to float32, as the published package computes and keeps them."""
    exact = rotary.signed_frequencies
    monkeypatch.setattr(rotary, "signed_frequencies", lambda *sizes: exact(*sizes).float().double())
