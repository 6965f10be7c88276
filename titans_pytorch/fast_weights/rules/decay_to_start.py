"""Forgetting towards the learned start of a memory instead of towards nothing, with the momentum of Titans.

    S_t = eta_t S_{t-1} - theta_t grad                        `move`, as in `titans.py`
    M_t = keep_t M_{t-1} + (1 - keep_t) M_0 + S_t             `retain`

So what was learned before a sequence began is never lost: a memory that forgets all is M_0 again, and the retention of
Miras (arXiv 2504.13173), a penalty on the distance from somewhere, is one on the distance from the start.
"""

from __future__ import annotations

from titans_pytorch.fast_weights.rules.gates import ChunkGates, Gates
from titans_pytorch.fast_weights.rules.rule import Coefficients, Term
from titans_pytorch.fast_weights.rules.titans import Titans


class DecayToStart(Titans):
    """The rule of Titans, forgetting towards the learned start."""

    uses_start = True

    def retain(self, weights: Term, step: Term, gates: ChunkGates, start: Term) -> Term:
        """The weights after a chunk: what is not forgotten, the start for the rest, and the step."""
        return gates.keep * weights + (1 - gates.keep) * start + step

    def coefficients(self, gates: Gates) -> Coefficients:
        """Those of Titans; the share of the start is what is left by none of the weights before the block."""
        found = super().coefficients(gates)
        return found._replace(start=1 - found.keep[..., 0])
