"""The gated delta rule (arXiv 2412.06464), with momentum: what is surprising is so after forgetting, not before.

    S_t = eta_t S_{t-1} - theta_t grad at keep_t M_{t-1}        `move`
    M_t = keep_t M_{t-1} + S_t                                  `retain`

The equations are those of Titans (`titans.py`) but for the place of the gradient. For a linear memory M(k) = k M
without momentum, with the sum of squares as the loss and beta = 2 theta, that is

    M_t = keep_t (1 - beta_t k_t k_t^T) M_{t-1} + beta_t k_t v_t^T

so what a key holds is replaced whole where beta is 1, however much is forgotten, and where all is forgotten the
surprise is that of an empty memory. Gradients have to be taken at the memory of every chunk's start.
"""

from __future__ import annotations

from titans_pytorch.fast_weights.rules.titans import Titans


class GatedDelta(Titans):
    """The rule of Titans, surprised at what is left of the memory after forgetting."""

    forgets_first = True
