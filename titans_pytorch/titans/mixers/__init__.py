"""The ways to use the memory, by name: as context (MAC), as gate (MAG), as layer (MAL), by itself (LMM), and yours."""

from __future__ import annotations

from titans_pytorch.public_names import register_state
from titans_pytorch.titans.mixers.lmm import MemoryAlone
from titans_pytorch.titans.mixers.mac import MemoryAsContext
from titans_pytorch.titans.mixers.mag import MemoryAsGate
from titans_pytorch.titans.mixers.mal import MemoryAsLayer
from titans_pytorch.titans.mixers.mixer import AttentionMixer, Mixer

MIXERS: dict[str, type[Mixer]] = {
    "mac": MemoryAsContext,
    "mag": MemoryAsGate,
    "mal": MemoryAsLayer,
    "lmm": MemoryAlone,
}


def register_mixer(name: str, kind: type[Mixer]) -> None:
    """Make `TitansBackbone(name, config)` one of this kind of mixer, which has a `State` and a `forward`."""
    if name in MIXERS:
        raise ValueError(f"name must be a new one, got {name!r}, which is {MIXERS[name].__name__}")
    if not (isinstance(kind, type) and issubclass(kind, Mixer) and hasattr(kind, "State")):
        raise TypeError(f"kind must be a class of Mixer with a State, got {kind!r}")
    if taken := [other for other in MIXERS.values() if other.State.__name__ == kind.State.__name__]:
        raise ValueError(
            f"kind must have a State of a new name, got {kind.State.__name__}, that of {taken[0].__name__}"
        )
    register_state(kind.State)
    MIXERS[name] = kind


__all__ = ["MIXERS", "AttentionMixer", "Mixer", "register_mixer"]
