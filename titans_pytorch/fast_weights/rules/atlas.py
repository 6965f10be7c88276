"""The rule of Atlas (arXiv 2505.23735): orthogonal steps along the momentum of a window, of a length that is gated.

    S_t = eta_t S_{t-1} - sum_{i=t-c+1..t} gamma_i^(t) grad l_i       (32) `move`, the window in `omega.py`
    M_t = (1 - alpha_t) M_{t-1} + delta_t NewtonSchulz5(S_t)          (33) `retain`, the iterations in `orthogonal.py`

Newton-Schulz iterations take away how long S_t is: step sizes of tokens only say how much each counts beside others.
How far a step goes is delta_t, a gate of its own. Vectors are no matrices, and pass the iterations as they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.fast_weights.rules.gates import ChunkGates, Gates
from titans_pytorch.fast_weights.rules.rule import Coefficients, GateSpec, Term
from titans_pytorch.fast_weights.rules.titans import Titans

LENGTH_BIAS = -3.0
"""What the logit of delta starts with: about 0.05 of an orthogonal matrix at every step"""


class SteppedByLength(Titans):
    """The rule of Titans, with a gate before the step, for `Orthogonal` to wrap."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own = self.gates[0].varies
        self.gates = (*self.gates, GateSpec("length", "to_step_length", "scale", varies=own, bias=LENGTH_BIAS))

    def retain(self, weights: Term, step: Term, gates: ChunkGates, start: Term) -> Term:
        """The weights after a chunk: what is not forgotten, and the step, as long as its gate says."""
        return gates.keep * weights + gates["length"][0] * step

    def coefficients(self, gates: Gates) -> Coefficients:
        """Those of Titans, where each step counts as its gate says."""
        found = super().coefficients(gates)
        return found._replace(keep=scaled_steps(found.keep, gates.shares["length"][0]))


def scaled_steps(keep: Tensor, length: Tensor) -> Tensor:
    """What is left of steps, times their lengths.  keep: (... n+1 n+1), length: (r n)"""
    scale = F.pad(length, (1, 0), value=1.0).unsqueeze(1)
    return keep * (scale if keep.ndim == 3 else scale.unsqueeze(1))
