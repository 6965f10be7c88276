"""The audit finds each defect that is planted here, names where it shows first, and blames nothing else."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import titans_pytorch
from tests.support.sequence_modules import NUM_TOKENS, READERS
from tests.support.streams import randn
from titans_pytorch.auditing.audit import AuditReport, audit, padded_with_mask, stream_with_state

TOKENS = 12


class Rule(nn.Module):
    """A module that is one function of its inputs, with a parameter so that there is something to disturb."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self.gain * x)

    def rule(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class GlobalMean(Rule):
    def rule(self, x: Tensor) -> Tensor:
        return x.cumsum(1) + x.mean(1, keepdim=True)


class TinyLeak(Rule):
    """Sees the last token at one part in ten million, from token 5 on."""

    def rule(self, x: Tensor) -> Tensor:
        late = (torch.arange(x.shape[1]) >= 5)[:, None]
        return x + 1e-7 * late * x[:, -1:]


class Ahead(Rule):
    """Only output 2 looks ahead, three tokens."""

    def rule(self, x: Tensor) -> Tensor:
        seen = torch.zeros_like(x)
        seen[:, 2:3] = x[:, 5:6]
        return x + seen


class KnowsLength(Rule):
    def rule(self, x: Tensor) -> Tensor:
        return x.cumsum(1) / x.shape[1]


class RowMean(Rule):
    """What batch norm does in training, from token 3 on."""

    def rule(self, x: Tensor) -> Tensor:
        late = (torch.arange(x.shape[1]) >= 3)[:, None]
        return x - late * x.mean(0, keepdim=True)


class KnowsBatchSize(Rule):
    def rule(self, x: Tensor) -> Tensor:
        return x / len(x)


class Sign(Rule):
    """Jumps with the last token: no slope shows it."""

    def rule(self, x: Tensor) -> Tensor:
        return x + x[:, -1:].sign()


class StraightThrough(Rule):
    """The value is causal, its gradient is not."""

    def rule(self, x: Tensor) -> Tensor:
        return x + (x.sum(1, keepdim=True) - x.sum(1, keepdim=True).detach())


class Faint(GlobalMean):
    """Outputs of size 1e-12: numbers have to be relative."""

    def rule(self, x: Tensor) -> Tensor:
        return 1e-12 * super().rule(x)


class LastRow(Rule):
    """Only the last row looks ahead."""

    def rule(self, x: Tensor) -> Tensor:
        return torch.cat((x[:-1], x[-1:] + x[-1:].mean(1, keepdim=True)))


class Product(Rule):
    """Sees the last token unless the inputs are zero."""

    def rule(self, x: Tensor) -> Tensor:
        return x * x[:, -1:]


class Draws(Rule):
    """Takes a number from the global random state and does nothing with it."""

    def rule(self, x: Tensor) -> Tensor:
        return x + 0 * torch.rand(1)


class MasksByProduct(Rule):
    """Causal, but a later NaN times a weight of 0 is NaN."""

    def rule(self, x: Tensor) -> Tensor:
        return torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril() @ x


class Streamed(Rule):
    """A running sum that can be carried from piece to piece."""

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        sums = (self.gain * x).cumsum(1)
        sums = sums if state is None else sums + state
        return sums, self.carry(sums)

    def carry(self, sums: Tensor) -> Tensor:
        return sums[:, -1:]


class Forgets(Streamed):
    """Starts anew with each piece."""

    def carry(self, sums: Tensor) -> Tensor:
        return torch.zeros_like(sums[:, -1:])


class ForgetsInside(Streamed):
    """Loses the carry when a piece ends inside a pair of tokens, as chunked memories do."""

    def carry(self, sums: Tensor) -> Tensor:
        return sums[:, -1:] * (sums.shape[1] % 2 == 0)


class CrashesInside(Streamed):
    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if state is not None and x.shape[1] % 2:
            raise RuntimeError("only whole pairs after the first piece")
        return super().forward(x, state)


class Local(Rule):
    """Sees `window` tokens back, and has a memory whose reading comes back multiplied by `effect`."""

    def __init__(self, window: int, effect: float) -> None:
        super().__init__()
        self.window, self.effect = window, effect

    def rule(self, x: Tensor) -> Tensor:
        near = sum(nn.functional.pad(x, (0, 0, back, 0))[:, : x.shape[1]] for back in range(self.window + 1))
        return near + self.effect * x.cumsum(1)


class Gated(nn.Module):
    """Residual branch behind a gate that starts at zero: what is inside shows only when the gate opens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.inner(x)


class Words(nn.Module):
    """Embedding and GRU, for integer ids; `peek` mixes the last token into all."""

    def __init__(self, peek: float = 0.0) -> None:
        super().__init__()
        self.embed, self.gru, self.peek = nn.Embedding(20, 6), nn.GRU(6, 5, batch_first=True), peek

    def forward(self, ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        return self.gru(x + self.peek * x[:, -1:], state)


def inputs(rows: int = 3, tokens: int = TOKENS, dim: int = 4) -> Tensor:
    return randn(rows, tokens, dim, seed=1, dtype=torch.float32)


def ids(rows: int = 3, tokens: int = TOKENS) -> Tensor:
    return torch.randint(20, (rows, tokens), generator=torch.Generator().manual_seed(1))


def by_position(module: nn.Module, piece: Tensor, state: Any) -> tuple[Tensor, Any]:
    return module(piece, state)


def failed(report: AuditReport) -> dict[str, int | None]:
    return {finding.name: finding.position for finding in report.failures}


def gru() -> nn.Module:
    return nn.GRU(4, 5, batch_first=True)


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(4), nn.Unflatten(0, (3, TOKENS)))


WITH_STATE = {"stream": stream_with_state}
CLEAN: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Any]]] = {
    "cumsum": (Rule, inputs(), {}),
    "masked product": (MasksByProduct, inputs(), {}),
    "carried": (Streamed, inputs(), {**WITH_STATE, "window": 3}),
    "gru": (gru, inputs(), {"stream": by_position, "window": 2}),
    "words": (Words, ids(), {"stream": by_position, "num_tokens": 20, "window": 2}),
    "one row": (Streamed, inputs(rows=1), WITH_STATE),
    "two tokens": (Streamed, inputs(tokens=2), {**WITH_STATE, "window": 0}),
    "one number per token": (nn.Identity, inputs()[..., 0], {}),
    "zeros": (gru, torch.zeros(2, 5, 4), {"stream": by_position}),
    "many positions and rows": (Streamed, inputs(rows=20, tokens=150), {**WITH_STATE, "window": 100}),
    "memory beyond a window": (lambda: Local(3, effect=1e-6), inputs(), {"window": 3}),
    "eval mode": (lambda: nn.Sequential(nn.BatchNorm1d(TOKENS), nn.Dropout(0.5)).eval(), inputs(), {}),
}


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_module_passes_every_check_it_was_given(name: str) -> None:
    build, given, options = CLEAN[name]
    report = audit(build(), given, **options)
    report.check()
    expected = {"future", "prefix", "batch"}
    expected |= {"gradient"} if given.is_floating_point() else set()
    expected |= {"pieces"} if "stream" in options else set()
    expected |= {"memory"} if "window" in options else set()
    if name == "eval mode":  # batch norm over positions takes no other length
        expected -= {"prefix"}
    assert {finding.name for finding in report.findings if finding.passed} == expected
    assert all(finding.passed is not False and finding.position is None for finding in report.findings)


LEAK = {"future": 0, "gradient": 0, "prefix": 0}
CUT = {**WITH_STATE, "splits": [(4, 8), (6, 3, 3)]}
PLANTED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, int]]] = {
    "global mean": (GlobalMean, {}, LEAK),
    "tiny leak": (TinyLeak, {}, dict.fromkeys(LEAK, 5)),
    "faint outputs": (Faint, {}, LEAK),
    "one row leaks": (LastRow, {}, {**LEAK, "batch": 0}),
    "one look ahead": (Ahead, {}, {"future": 2, "gradient": 2}),
    "no slope": (Sign, {}, {"future": 0, "prefix": 0}),
    "slope only": (StraightThrough, {}, {"gradient": 0}),
    "length": (KnowsLength, {}, {"prefix": 0}),
    "row mean": (RowMean, {}, {"batch": 3}),
    "batch size": (KnowsBatchSize, {}, {"batch": 0}),
    "batch norm": (batch_norm, {}, {"future": 0, "gradient": 0, "batch": 0}),
    "forgets": (Forgets, WITH_STATE, {"pieces": 1}),
    "forgets inside pairs": (ForgetsInside, CUT, {"pieces": 9}),
    "crashes inside pairs": (CrashesInside, CUT, {"pieces": 6}),
    "no memory": (lambda: Local(3, effect=0.0), {"window": 3}, {"memory": 4}),
    "leak behind closed gates": (
        lambda: Gated(nn.Sequential(Rule(), Gated(GlobalMean()))),
        {},
        LEAK,
    ),
    "rows behind closed gates": (lambda: Gated(nn.Sequential(nn.Tanh(), Gated(RowMean()))), {}, {"batch": 3}),
    "leak, then rows": (lambda: nn.Sequential(Ahead(), RowMean()), {}, {"future": 2, "gradient": 2, "batch": 3}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_defect_is_found_at_its_first_position_and_nothing_else(name: str) -> None:
    build, options, expected = PLANTED[name]
    report = audit(build(), inputs(), **options)
    assert failed(report) == expected
    for finding in report.failures:
        assert finding.value is not None
        assert (finding.value > 1e-9) == (finding.name != "memory")
        assert finding.name == "memory" or f"output {finding.position} changes" in finding.detail


def test_ids_are_audited_by_exchanging_them() -> None:
    report = audit(Words(peek=0.1), ids(), stream=by_position, num_tokens=20)
    assert failed(report) == {"future": 0, "prefix": 0, "pieces": 0}
    assert report["gradient"].passed is None
    assert audit(Words(), ids().to(torch.int32), num_tokens=20).passed


def test_the_size_of_a_leak_is_its_value() -> None:
    assert 1e-8 < audit(TinyLeak(), inputs())["future"].value < 1e-6
    lenient = audit(TinyLeak(), inputs(), tolerance=1e-3)
    assert lenient.passed
    assert lenient["future"].value > 0
    assert "within tolerance" in lenient["future"].detail
    assert "bitwise" in audit(Rule(), inputs())["future"].detail


def test_inputs_of_zeros_hide_nothing() -> None:
    assert failed(audit(Product(), torch.zeros(2, 6, 4))) == LEAK


def test_a_rare_leak_is_named_among_many_positions() -> None:
    assert failed(audit(Ahead(), inputs(tokens=64))) == {"future": 2, "gradient": 2}
    assert "future" in failed(audit(GlobalMean(), inputs(tokens=500)))


def test_memory_reports_how_far_it_reaches() -> None:
    finding = audit(Local(6, effect=0.0), inputs(), window=2)["memory"]
    assert finding.passed
    assert finding.value > 0.1
    assert "up to 6 tokens away" in finding.detail


def test_nan_in_later_tokens_is_noted_but_does_not_fail() -> None:
    report = audit(MasksByProduct(), inputs())
    assert report.passed
    assert report.notes == ("output 0 changes by inf when tokens from 11 on are NaN",)
    assert not audit(MasksByProduct(), inputs(), poison=False).notes
    assert not audit(Rule(), inputs()).notes


def test_what_a_module_refuses_is_noted_and_not_checked() -> None:
    report = audit(batch_norm(), inputs(), poison=False)
    assert report["prefix"].passed is None
    assert [note for note in report.notes if "refuses later tokens that are absent" in note]


@pytest.mark.parametrize("build", [GlobalMean, Draws, batch_norm, gru])
def test_the_module_and_the_global_random_state_stay_as_they_were(build: Callable[[], nn.Module]) -> None:
    module, given = build(), inputs()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.random.get_rng_state()
    audit(module, given, stream=by_position if build is gru else None, window=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(given, inputs())
    assert module.training
    assert all(parameter.grad is None for parameter in module.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype


def test_the_same_seed_gives_the_same_report() -> None:
    reports = [audit(GlobalMean(), inputs(tokens=100), seed=seed) for seed in (3, 3, 4)]
    assert reports[0] == reports[1] != reports[2]


def test_the_report_reads_well_and_can_be_asserted() -> None:
    report = audit(GlobalMean(), inputs(), stream=None)
    lines = str(report).splitlines()
    assert lines[0] == "audit of GlobalMean on (3 12 4)"
    assert lines[1].startswith("FAIL future")
    assert lines[1].split("later tokens? ")[1].startswith("output 0 changes by ")
    assert lines[4] == "ok   batch     0.0e+00  do outputs depend on other rows of the batch? no, bitwise"
    assert (
        lines[5]
        == "-    pieces             does feeding pieces differ from feeding all? not checked, which needs stream="
    )
    with pytest.raises(AssertionError, match="FAIL future"):
        report.check()
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.findings = ()  # type: ignore[misc]


def test_any_call_can_be_wrapped() -> None:
    class Named(Rule):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"answer": self.rule(x)}

    audit(Named(), inputs(), forward=lambda module, x: module(x)["answer"]).check()


@pytest.mark.parametrize(
    "module, given, options, message",
    [
        (nn.Dropout(0.5), inputs(), {}, "dropout"),
        (nn.Flatten(), inputs(), {}, r"outputs must be \(b t ...\)"),
        (Rule(), inputs() * torch.nan, {}, "finite"),
        (Rule(), inputs(tokens=1), {}, "t > 1"),
        (Rule(), inputs()[0, 0], {}, "t > 1"),
        (Rule(), inputs() > 0, {}, "bool"),
        (Rule(), inputs(), {"num_tokens": 5}, "num_tokens"),
        (Words(), ids(), {}, "num_tokens"),
        (Words(), ids(), {"num_tokens": 5}, "below num_tokens"),
        (Rule(), inputs(), {"window": 11}, r"0\.\.10"),
        (Rule(), inputs(), {"window": -1}, "window"),
        (Rule(), inputs(), {"splits": [(5, 6)]}, "sum to 12"),
        (Rule(), inputs(), {"splits": [(12, 0)]}, "positive"),
        (Rule(), inputs(), {"tolerance": 0.0}, "tolerance"),
    ],
)
def test_wrong_arguments_are_named(module: nn.Module, given: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audit(module, given, **options)


def test_a_function_is_not_a_module() -> None:
    with pytest.raises(TypeError, match="module must be"):
        audit(torch.tanh, inputs())  # type: ignore[arg-type]


def test_the_function_hides_no_module() -> None:
    """`from titans_pytorch import audit` is the function, and there is no module of that name."""
    assert titans_pytorch.audit is audit
    assert importlib.util.find_spec("titans_pytorch.audit") is None
    assert importlib.import_module("titans_pytorch.auditing.audit").audit is audit


def test_the_version_is_that_of_the_project_and_the_public_names_are_sorted() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    package = Path(titans_pytorch.__file__).read_text()
    (version,) = re.findall(r'^version = "(.*)"', project, flags=re.MULTILINE)
    assert f'__version__ = "{version}"' in package  # for a checkout that is not installed
    assert re.fullmatch(r"\d+\.\d+\.\d+\w*", titans_pytorch.__version__)
    names = [name for name in titans_pytorch.__all__ if not name.startswith("__")]
    assert names == sorted(names)
    assert all(hasattr(titans_pytorch, name) for name in titans_pytorch.__all__)


# padding


class Masked(Rule):
    """Sums of what is not padding; the defect is what a subclass makes of the mask."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x if attention_mask is None else self.masked(x, attention_mask))

    def masked(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask[..., None]


class IgnoresTheMask(Masked):
    def masked(self, x: Tensor, mask: Tensor) -> Tensor:
        return x


class MeansOfAllPositions(Masked):
    """Padding has no value, but it counts."""

    def rule(self, x: Tensor) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


class HidesNothingInside(Masked):
    """Knows only padding at the ends."""

    def masked(self, x: Tensor, mask: Tensor) -> Tensor:
        seen, coming = mask.cumsum(1) > 0, mask.flip(1).cumsum(1).flip(1) > 0
        return x * (seen & coming)[..., None]


@pytest.mark.parametrize(
    "kind, words",
    [
        (Masked, "no, bitwise"),
        (IgnoresTheMask, "with padding"),
        (MeansOfAllPositions, "with padding"),
        (HidesNothingInside, "with padding (inside|anywhere)"),
        (Rule, "with padding .*, which raises TypeError"),
    ],
)
def test_padding_that_leaves_a_trace_is_found(kind: type[Rule], words: str) -> None:
    report = audit(kind(), inputs(), padded=padded_with_mask)
    assert re.search(words, report["padding"].detail)
    assert set(failed(report)) == (set() if kind is Masked else {"padding"})


@pytest.mark.parametrize("name", ["TitansMAC, plain", "MemoryAsContextTransformer, everything", "NeuralMemory, heads"])
def test_padding_leaves_no_trace_in_ours(name: str) -> None:
    reader = READERS[name]
    tokens = NUM_TOKENS if reader.reads == "ids" else None
    audit(reader.made(), reader.given(3, TOKENS), padded=padded_with_mask, num_tokens=tokens).check()
