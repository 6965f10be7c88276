"""What all models here are to transformers: what they support, and how weights are made that no file has."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from titans_pytorch.hf.config import LibraryConfig
from titans_pytorch.initialization import reset_parameters


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

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model, whose weights have to stay on their device: a memory reads them outside of any `forward`."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                "device_map must not offload weights to the host or the disk, got "
                f"{', '.join(sorted(places))}: memories read them where they are"
            )
        return loaded

    def initialize_weights(self) -> None:
        """Initialise what the constructor could not, as it ran on the meta device, and what a file did not have.

        The default of transformers would overwrite gates, convolutions and memories with small random numbers, and
        their biases with 0.
        """
        missing = [parameter for parameter in self.parameters() if not getattr(parameter, "_is_hf_initialized", False)]
        if self.was_on_meta and missing and not any(parameter.is_meta for parameter in self.parameters()):
            reset_parameters(self, only=missing)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module that was added to a model, as an embedding of another size."""
        if own := list(module.parameters(recurse=False)):
            reset_parameters(module, only=own)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Its paged cache would go unseen: every token would be read as the first, and wrong ones generated."""
        raise NotImplementedError("continuous batching needs a cache of keys and values, use generate() instead")
