"""Rules by name: what `NeuralMemory(rule=...)` takes, and what the published options say of the rule of Titans."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from titans_pytorch.checks import value_checks
from titans_pytorch.fast_weights.rules.atlas import SteppedByLength
from titans_pytorch.fast_weights.rules.decay_to_start import DecayToStart
from titans_pytorch.fast_weights.rules.gated_delta import GatedDelta
from titans_pytorch.fast_weights.rules.lact import LaCT
from titans_pytorch.fast_weights.rules.orthogonal import Orthogonal
from titans_pytorch.fast_weights.rules.retention import KullbackLeibler, QNorm, Retained
from titans_pytorch.fast_weights.rules.rule import Rule
from titans_pytorch.fast_weights.rules.titans import Titans


@dataclass(frozen=True)
class RuleOptions:
    """What the arguments of a `NeuralMemory` say of its rule; it explains each of them, and has the defaults."""

    momentum: bool
    momentum_order: int
    learned_momentum_combine: bool
    learned_combine_include_zeroth: bool
    spectral_norm_surprises: bool
    per_parameter_gates: bool
    channelwise_decay: bool
    init_adaptive_step_bias: float | None
    init_momentum_bias: float | None
    init_decay_bias: float | None
    window: int

    def __post_init__(self) -> None:
        value_checks.check_whole(momentum_order=self.momentum_order, window=self.window)
        value_checks.check_switches(**{name: each for name, each in vars(self).items() if name in SWITCHES})
        value_checks.check_number(
            init_adaptive_step_bias=self.init_adaptive_step_bias,
            init_momentum_bias=self.init_momentum_bias,
            init_decay_bias=self.init_decay_bias,
        )
        if self.learned_momentum_combine and not (self.momentum and self.momentum_order > 1):
            got = f"momentum={self.momentum} and momentum_order={self.momentum_order}"
            raise ValueError(f"learned_momentum_combine needs momentum of more than one order, got {got}")
        if self.init_momentum_bias is not None and not self.momentum:
            raise ValueError(f"init_momentum_bias needs momentum, got {self.init_momentum_bias} with momentum=False")


SWITCHES = (
    "momentum",
    "learned_momentum_combine",
    "learned_combine_include_zeroth",
    "spectral_norm_surprises",
    "per_parameter_gates",
    "channelwise_decay",
)

PLAIN = RuleOptions(True, 1, False, False, False, False, False, None, None, None, 1)
"""Momentum of one order, and nothing else"""

MakeRule = Callable[[RuleOptions], Rule]


def titans(options: RuleOptions, kind: Callable[..., Titans] = Titans) -> Rule:
    """Momentum and forgetting, as the published options ask for them; kind: of what is near to them"""
    orders = options.momentum_order if options.momentum else 0
    num_combined = orders + options.learned_combine_include_zeroth if options.learned_momentum_combine else 0
    rule = kind(
        orders,
        num_combined,
        per_parameter=options.per_parameter_gates,
        channelwise=options.channelwise_decay,
        rate_bias=options.init_adaptive_step_bias,
        momentum_bias=options.init_momentum_bias,
        decay_bias=options.init_decay_bias,
        window=options.window,
    )
    return Orthogonal(rule) if options.spectral_norm_surprises else rule


def atlas(options: RuleOptions) -> Rule:
    """Orthogonal steps whose length is gated."""
    if options.spectral_norm_surprises:
        raise ValueError("spectral_norm_surprises must be False with rule='atlas', which has such steps, got True")
    return Orthogonal(titans(options, SteppedByLength))


def norm_retention(options: RuleOptions, number: float = 4.0) -> Rule:
    """Weights that are divided by a power of their norm, as Moneta's."""
    return titans(options, partial(Retained, QNorm(number)))


def kl_retention(options: RuleOptions) -> Rule:
    """Weights that are shares, as Memora's."""
    return titans(options, partial(Retained, KullbackLeibler()))


def lact(options: RuleOptions) -> Rule:
    """Momentum and norms that stay, which leaves nothing to be forgotten."""
    given = dict(
        momentum_order=options.momentum and options.momentum_order > 1,
        channelwise_decay=options.channelwise_decay,
        init_decay_bias=options.init_decay_bias is not None,
        window=options.window > 1,
    )
    if wrong := [name for name, is_given in given.items() if is_given]:
        raise ValueError(
            f"{wrong[0]} must be left out with rule='lact', which has one order of momentum, no window and no "
            f"forgetting, got {getattr(options, wrong[0])}"
        )
    rule = LaCT(
        options.momentum,
        per_parameter=options.per_parameter_gates,
        rate_bias=options.init_adaptive_step_bias,
        momentum_bias=options.init_momentum_bias,
    )
    return Orthogonal(rule) if options.spectral_norm_surprises else rule


RULES: dict[str, MakeRule] = {
    "atlas": atlas,
    "titans": titans,
    "kl": kl_retention,
    "lq": norm_retention,
    "gated_delta": partial(titans, kind=GatedDelta),
    "decay_to_start": partial(titans, kind=DecayToStart),
    "lact": lact,
}


NUMBERED: dict[str, Callable[..., Rule]] = {"lq": norm_retention}
"""Rules with a number behind a colon"""


def make_of(name: str, argument: str = "rule") -> MakeRule:
    """How a rule that is known is made: lq, or lq:2.5 with a number of its own."""
    if name in RULES:
        return RULES[name]
    kind, _, number = name.partition(":")
    if kind not in NUMBERED:
        known = ", ".join(map(repr, sorted(RULES)))
        raise ValueError(f"{argument} must be one of {known}, lq with a number as in 'lq:4', or a Rule, got {name!r}")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 1 < value < math.inf or value == 3:
        raise ValueError(
            f"{argument} 'lq' must have a number above 1 behind its colon, and not 3, where weights forget how long "
            f"they were, got {name!r}"
        )
    return partial(NUMBERED[kind], number=value)


def register_rule(name: str, make: MakeRule) -> None:
    """Make a rule known by name, so that it can be chosen and saved."""
    if name in RULES:
        raise ValueError(f"a rule's name must be new, got {name!r}, which is taken; taken are {sorted(RULES)}")
    RULES[name] = make


def forgets(name: str) -> bool:
    """Whether a rule with this name has a gate of what is forgotten."""
    return make_of(name)(PLAIN).forgets


def rule_of(rule: str | Rule, options: RuleOptions, defaults: RuleOptions) -> Rule:
    """The rule of a memory: one by name, made as the options ask, or one that is given and needs no options."""
    if isinstance(rule, str):
        return make_of(rule)(options)
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be a name or a Rule, got {type(rule).__name__}")
    if given := [name for name, value in vars(options).items() if value != getattr(defaults, name)]:
        raise ValueError(f"{', '.join(given)} must be left to the rule where one is given, got {type(rule).__name__}")
    return rule
