"""What all models here are to transformers: what they support, and how weights are made that no file has."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from titans_pytorch.hf.config import LibraryConfig


class TitansPreTrainedModel(PreTrainedModel):
    """A model around modules of the library, whose own initialisation stands."""

    config: LibraryConfig
    config_class = LibraryConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TitansBlock", "MACLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _is_stateful = False  # states are values that can be kept: rollback works
    _supports_sdpa = False

    was_on_meta: bool  # as from_pretrained constructs models

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what the constructor could not, as it ran on the meta device, and what a file did not have.

        The default of transformers would overwrite gates, convolutions and memories with small random numbers, and
        their biases with 0. What is missing is taken from a second model instead, module by module, as transformers
        marks modules without parameters of their own as initialised.
        """
        if not self.was_on_meta or any(tensor.is_meta for tensor in own_tensors(module).values()):
            return
        if (example := self._examples().get(module)) is None:  # a module that was added later, as a resized embedding
            module.reset_parameters()  # type: ignore[operator]
            return
        for name, tensor in own_tensors(module).items():
            init.copy_(tensor, getattr(example, name))  # leaves alone what was loaded

    def _examples(self) -> dict[nn.Module, nn.Module]:
        """Every module and its counterpart in a model that was constructed with values."""
        if "_fresh" not in self.__dict__:
            with torch.device("cpu"):
                fresh = type(self)(self.config)
            self.__dict__["_fresh"] = dict(zip(self.modules(), fresh.modules(), strict=True))
        return self.__dict__["_fresh"]

    def initialize_weights(self) -> None:
        super().initialize_weights()
        for module in self.modules():
            module.__dict__.pop("_fresh", None)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Its paged cache would go unseen: every token would be read as the first, and wrong ones generated."""
        raise NotImplementedError("continuous batching needs a cache of keys and values, use generate() instead")


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a module, without those of its parts."""
    return dict((*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)))
