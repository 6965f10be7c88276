# /// script
# requires-python = ">=3.10"
# dependencies = ["titans-pytorch[examples]"]
#
# [tool.uv.sources]
# titans-pytorch = { path = ".", editable = true }
# ///
"""python train_titans.py: byte-level language models, the memory as context, gate, layer or alone (--variant)."""

from titans_pytorch.training import start
from titans_pytorch.training.models import PaperModel

PRESETS = dict(
    debug=dict(
        **dict(dim=32, depth=2, heads=2, window=16, memory_heads=2, memory_chunk=8, memory_refresh=16),
        **dict(steps=10, batch=2, sequence=64, lr=2e-3, warmup=2, validate_every=5, validate_sequences=4),
        **dict(sample_every=0, sample_length=32, prime_length=16, checkpoint_every=5, data="python"),
    ),
    cpu=dict(  # where memory was found to pay: docs/results.md, "Code, in equal steps"
        **dict(variant="mag", dim=128, depth=4, heads=4, window=32, ff_hidden=512),
        **dict(memory_layers=(3,), memory_chunk=16, memory_refresh=64, max_step=0.1, decay_bias=-7.0),
        **dict(steps=256, batch=4, sequence=1024, lr=2e-3, optimizer="adamw", warmup=20, clip=1.0, data="python"),
        **dict(validate_every=64, sample_every=128, sample_length=256, checkpoint_every=64),
    ),
    gpu=dict(
        **dict(dim=384, depth=8, heads=6, window=64, memory_heads=6, memory_chunk=16, memory_refresh=32),
        **dict(steps=100_000, batch=4, accumulate=4, sequence=512, lr=2e-4, clip=0.5),
    ),
)

if __name__ == "__main__":
    raise SystemExit(start("titans", PaperModel, PRESETS))
