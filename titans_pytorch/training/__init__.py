"""Training, written once for every script: data, loop, runs that survive being killed, pictures.

A script names its model settings and presets and calls `start`:

    if __name__ == "__main__":
        raise SystemExit(start("mac", MACModel, PRESETS))

Model settings are a dataclass whose fields become options of the command line, with a method `build() -> nn.Module`
(and, if wanted, `check()`, which raises `SettingsError`). The model has to

- give the mean next-token loss of ids (b n) as `model(ids, return_loss=True)`, and logits (b n 256) as `model(ids)`,
- go on with a sequence: `logits, cache = model(ids, cache=None, return_cache=True)`, for samples,
- be saved and loaded: `titans_pytorch.pretrained.Pretrained`,
- keep its blocks in `model.layers`, which is what gets sharded.
"""

from titans_pytorch.training.errors import SettingsError
from titans_pytorch.training.settings import setting
from titans_pytorch.training.start import start

__all__ = ["SettingsError", "setting", "start"]
