"""Training, written once for every script: data, loop, runs that survive being killed, pictures.

A script names its model settings and presets and calls `start`:

    if __name__ == "__main__":
        raise SystemExit(start("mac", MACModel, PRESETS))

Model settings are a dataclass whose fields become options of the command line, with a method `build(num_tokens)` (and,
if wanted, `check()`, which raises `SettingsError`). The model has to be

- a language model, `titans_pytorch.causal_lm.CausalLM`, whose call gives logits (or a tuple that begins with them),
- saved and loaded: `titans_pytorch.pretrained.Pretrained`,
- made of blocks in `model.layers`, which is what gets sharded.
"""

from titans_pytorch.training.errors import SettingsError
from titans_pytorch.training.settings import setting
from titans_pytorch.training.start import start

__all__ = ["SettingsError", "setting", "start"]
