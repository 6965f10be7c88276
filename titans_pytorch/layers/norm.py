"""RMS norm that stays in its own precision: what comes in half precision is normed in that of the gain."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """Without it autocast would hand half precision to a gain in float32, which torch computes slowly and warns of."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.eps)
