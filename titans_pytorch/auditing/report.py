"""What an audit found: numbers with names, and a text that a person can read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One question and its answer. `value` and `passed` are None where nothing was checked."""

    name: str
    question: str
    value: float | None
    position: int | None
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        verdict = {True: "ok", False: "FAIL", None: "-"}[self.passed]
        value = "" if self.value is None else f"{self.value:.1e}"
        return f"{verdict:<5}{self.name:<10}{value:<9}{self.question} {self.detail}"


@dataclass(frozen=True)
class AuditReport:
    """What `audit` found about one module; `report["future"]` is the finding of that name."""

    subject: str
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.passed is False)

    @property
    def passed(self) -> bool:
        """Nothing failed. What was not checked did not fail."""
        return not self.failures

    def check(self) -> None:
        """Raise AssertionError with the whole report if anything failed."""
        if not self.passed:
            raise AssertionError(str(self))

    def __getitem__(self, name: str) -> Finding:
        return {finding.name: finding for finding in self.findings}[name]

    def __str__(self) -> str:
        return "\n".join([f"audit of {self.subject}", *map(str, self.findings), *(f"note: {n}" for n in self.notes)])
