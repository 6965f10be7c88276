"""Rules: how a memory's weights follow from its surprises.  What is needed to write one of your own."""

from titans_pytorch.fast_weights.rules.orthogonal import Orthogonal
from titans_pytorch.fast_weights.rules.registry import RULES, register_rule
from titans_pytorch.fast_weights.rules.rule import GateSpec, Rule
from titans_pytorch.fast_weights.rules.titans import Titans

__all__ = ["RULES", "GateSpec", "Orthogonal", "Rule", "Titans", "register_rule"]
