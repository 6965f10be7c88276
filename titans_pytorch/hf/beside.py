"""A memory beside layers of a model that is already trained: shut at first, and the only thing that trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from titans_pytorch.checks import value_checks
from titans_pytorch.hf.cache import Fed, TitansCache
from titans_pytorch.hf.documents import new_columns
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.pretrained import Pretrained
from titans_pytorch.ragged import Marks, read_without_state

PREPARES = "_prepare_cache_for_generation"
"""The method of models that `generate` asks for a cache"""


class AddedMemory(Pretrained, nn.Module):
    """Memories that see what some layers of a decoder see, and add to what they say.

        model = AutoModelForCausalLM.from_pretrained("gpt2").requires_grad_(False)
        added = AddedMemory(model.config.hidden_size, layers=(4, 8), options=dict(chunk_size=16, batch_size=64))
        added.attach_to(model)
        optimizer = torch.optim.AdamW(added.parameters())        # and train `model` as ever
        added.save_pretrained("memory")                          # without the model

        AddedMemory.from_pretrained("memory").attach_to(model)   # into a model that is as it was

    Every memory has a gate for each feature, which begins at 0: until they are trained, the model says bit for bit what
    it said before. `generate` works as before, beams, left padding and prompt lookup included: what the memories have
    read goes with the model's own cache.

    Args:
        dim: features of the model
        layers: numbers, from 1, of the layers that get one
        options: of the memories, as `NeuralMemory` takes them
    """

    def __init__(self, dim: int, layers: Sequence[int], options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        value_checks.check_whole(dim=dim)
        self.layers = value_checks.check_layers("layers", layers, max(layers, default=1))
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers must be different numbers, at least one, got {self.layers}")
        options = {"chunk_size": 16} | dict(options or {})
        self.memories = nn.ModuleList(NeuralMemory(dim, **options) for _ in self.layers)
        self.gates = nn.ParameterList(torch.empty(dim) for _ in self.layers)
        self.dim, self.handles = dim, list[RemovableHandle]()
        self.attached: tuple[PreTrainedModel, ...] = ()  # in a tuple, as the model is no part of this
        self.mask: Tensor | None = None  # of the call that runs
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Only what it owns itself: the gates are shut."""
        for gate in self.gates:
            nn.init.zeros_(gate)

    # ---- in a model

    def attach_to(self, model: PreTrainedModel) -> AddedMemory:
        """Go beside the layers of a model, and where they are; the model's own parameters stay what they are."""
        if self.attached:
            raise ValueError("a memory can be attached to one model at a time, call remove() first")
        if PREPARES in model.__dict__:
            raise ValueError(
                "model must have no added memory yet: name all layers at once, or remove() the other first"
            )
        decoder, layers = decoder_layers(model)
        value_checks.check_layers("layers", self.layers, len(layers))
        if (width := model.config.get_text_config().hidden_size) != self.dim:
            raise ValueError(f"dim must be that of the model, {width}, got {self.dim}")
        self.attached = (model,)
        model.__dict__[PREPARES] = remembered_from_the_start(getattr(model, PREPARES, None))
        self.handles.append(decoder.register_forward_pre_hook(self.before_a_call, with_kwargs=True))
        for place, number in enumerate(self.layers):
            layer = layers[number - 1]
            device = next(layer.parameters()).device
            self.memories[place].to(device)
            self.gates[place].data = self.gates[place].data.to(device)
            self.handles.append(layer.register_forward_hook(self.hook(place), with_kwargs=True))
        return self

    def remove(self) -> None:
        """Leave the model, which is then as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for model in self.attached:
            model.__dict__.pop(PREPARES)
        self.attached = ()

    def before_a_call(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Layers are not told which tokens are padding, the decoder is."""
        self.mask = kwargs.get("attention_mask")

    def hook(self, place: int) -> Any:
        """What is called with all that a layer was given and what it says."""

        def beside(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], said: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            hidden = said[0] if isinstance(said, tuple) else said
            remembered = self.read(place, x, cache_among((*args, *kwargs.values())))
            changed = hidden + (self.gates[place] * remembered).to(hidden.dtype)
            return (changed, *said[1:]) if isinstance(said, tuple) else changed

        return beside

    def read(self, place: int, x: Tensor, cache: Cache | None) -> Tensor:
        """What a memory says of the next tokens, which it then stores.  x: (b n dim) -> same"""
        memory = self.memories[place]
        x, mask = x.to(self.gates[place].dtype), new_columns(self.mask, x)

        def read(piece: Tensor, state: Any) -> tuple[Tensor, Any]:
            outputs, state = memory(piece, state=state)
            return outputs, state.at_rest()

        if cache is None:
            return read_without_state(read, x, Marks(mask, None), None)
        mask = None if mask is None or bool(mask.all()) else mask
        number = self.layers[place]
        own = remembering(cache, number)
        if (length := own.get_seq_length() + x.shape[1]) != (got := cache.get_seq_length(number - 1)):
            raise ValueError(
                f"past_key_values must have been read with this memory from its first token, got {got} tokens in layer "
                f"{number}, of which the memory has read {length}"
            )
        return own.advance(read, Fed(x, mask))


# ---- the cache of the model


class Remembering:
    """What a cache of transformers does when it also holds what memories have read; mixed into its class."""

    memories: dict[int, TitansCache]  # by the number of the layer
    records_past: bool

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        for memory in self.memories.values():
            memory.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        for memory in self.memories.values():
            memory.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        for memory in self.memories.values():
            memory.batch_repeat_interleave(repeats)

    def activate_past_recording(self) -> None:
        super().activate_past_recording()  # type: ignore[misc]
        self.records_past = True
        for memory in self.memories.values():
            memory.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)  # type: ignore[misc]
        for memory in self.memories.values():
            memory.crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.memories.clear()


def remembers(cache: Any) -> Any:
    """A cache, which becomes one that holds what memories have read, too."""
    if not isinstance(cache, Remembering):
        kind = type(cache)
        cache.__class__ = type(f"Remembering{kind.__name__}", (Remembering, kind), {})
        cache.memories, cache.records_past = {}, False
    return cache


def remembering(cache: Any, number: int) -> TitansCache:
    """What the memory beside a layer has read, kept with the model's cache."""
    found: dict[int, TitansCache] = remembers(cache).memories
    if number not in found:
        found[number] = TitansCache()
        if cache.records_past:
            found[number].activate_past_recording()
    return found[number]


def remembered_from_the_start(prepare: Any) -> Any:
    """How `generate` makes a cache; it is told of rollbacks to come before its first call, and so has to remember."""

    def prepared(generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        answer = prepare(generation_config, model_kwargs, *args)
        if isinstance(cache := model_kwargs.get("past_key_values"), Cache):
            remembers(cache)
            if generation_config.is_assistant:
                cache.activate_past_recording()
        return answer

    return prepared


def cache_among(given: Sequence[Any]) -> Cache | None:
    """The cache that a layer was given, if any."""
    caches = [each for each in given if isinstance(each, Cache)]
    if any(isinstance(cache, EncoderDecoderCache) for cache in caches):
        raise TypeError("a memory can be added to a decoder alone, got one with cross-attention")
    return caches[0] if caches else None


def decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder of a model, and its layers: the first list of as many modules as there are layers."""
    decoder = model.get_decoder()
    depth = model.config.get_text_config().num_hidden_layers
    for part in decoder.modules():
        if isinstance(part, nn.ModuleList) and len(part) == depth:
            return decoder, part
    raise ValueError(f"model must have its {depth} layers in one nn.ModuleList, got {type(model).__name__} without")
