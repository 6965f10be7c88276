# /// script
# requires-python = ">=3.10"
# dependencies = ["titans-pytorch[examples]"]
#
# [tool.uv.sources]
# titans-pytorch = { path = ".", editable = true }
# ///
"""python train_implicit_mlp_attn.py: a byte-level language model whose attention is an MLP made of the context."""

from titans_pytorch.training import start
from titans_pytorch.training.models import AttentionModel

PRESETS = dict(
    debug=dict(
        **dict(dim=32, depth=2, heads=2, dim_head=16, mlp_hiddens=(16, 32, 16), ff_mult=2.0),
        **dict(steps=10, batch=2, sequence=64, lr=2e-3, warmup=2, validate_every=5, validate_sequences=4),
        **dict(sample_every=0, sample_length=32, prime_length=16, checkpoint_every=5, data="python"),
    ),
    cpu=dict(
        **dict(dim=128, depth=4, heads=4, dim_head=32, mlp_hiddens=(32, 64, 32)),
        **dict(steps=500, batch=8, sequence=256, lr=3e-3, warmup=40, validate_every=50),
        **dict(sample_every=100, sample_length=256, checkpoint_every=50),
    ),
    gpu=dict(steps=100_000, batch=4, accumulate=4, sequence=512, lr=2e-4, clip=0.5),
)

if __name__ == "__main__":
    raise SystemExit(start("implicit-mlp-attn", AttentionModel, PRESETS))
