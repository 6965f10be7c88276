# /// script
# requires-python = ">=3.10"
# dependencies = ["titans-pytorch[examples]"]
#
# [tool.uv.sources]
# titans-pytorch = { path = ".", editable = true }
# ///
"""python train_mac.py: a byte-level language model that remembers what its attention no longer sees."""

from titans_pytorch.training import start
from titans_pytorch.training.models import MACModel

PRESETS = dict(
    debug=dict(
        **dict(dim=32, depth=2, heads=2, dim_head=16, window=16, residual_streams=1, ff_mult=2.0),
        **dict(memory_layers=(2,), memory_heads=2, memory_dim_head=16, memory_batch=32, spectral_norm=False),
        **dict(steps=10, batch=2, sequence=64, lr=2e-3, warmup=2, validate_every=5, validate_sequences=4),
        **dict(sample_every=0, sample_length=32, prime_length=16, checkpoint_every=5, data="python"),
    ),
    cpu=dict(
        **dict(dim=128, depth=4, heads=4, dim_head=32, window=32, residual_streams=2),
        **dict(memory_layers=(2, 4), memory_heads=2, memory_dim_head=32, memory_chunk=16, memory_batch=64),
        **dict(memory_max_lr=0.03, spectral_norm=False),
        **dict(steps=300, batch=8, sequence=256, lr=3e-3, warmup=30, validate_every=50),
        **dict(sample_every=100, sample_length=256, checkpoint_every=50, data="python"),
    ),
    gpu=dict(steps=100_000, batch=4, accumulate=4, sequence=512, lr=2e-4, clip=0.5),
)

if __name__ == "__main__":
    raise SystemExit(start("mac", MACModel, PRESETS))
