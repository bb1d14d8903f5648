"""What the doctor found, as data and as a table."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

Verdict = Literal["ok", "note", "fail"]


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Attributes:
        name: What was checked.
        verdict: ``"ok"``, ``"note"`` (it could not be checked, or is worth knowing) or ``"fail"``.
        message: What was found.
    """

    name: str
    verdict: Verdict
    message: str


@dataclasses.dataclass
class Diagnosis:
    """All that was found out about a checkpoint.

    Attributes:
        checkpoint: Facts: source, revision, what the weights are, configuration, process, number of parameters.
        checks: Findings in the order in which they were made.
        figures: NELBO and standard error in nats per token, perplexities, numbers of tokens.
    """

    checkpoint: dict[str, Any]
    checks: list[CheckResult] = dataclasses.field(default_factory=list)
    figures: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return all(check.verdict != "fail" for check in self.checks)

    def add(self, name: str, verdict: Verdict, message: str) -> None:
        """Append a finding."""
        self.checks.append(CheckResult(name, verdict, message))

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON, where infinite figures are None."""
        figures = {name: value if math.isfinite(value) else None for name, value in self.figures.items()}
        checks = [dataclasses.asdict(check) for check in self.checks]
        return {"healthy": self.healthy, "checkpoint": self.checkpoint, "figures": figures, "checks": checks}

    def tables(self) -> tuple[Table, Table]:
        """Return facts and findings for a terminal."""
        from rich.table import Table
        from rich.text import Text

        facts, findings = (Table(show_header=False, box=None, padding=(0, 2, 0, 0)) for _ in range(2))
        facts.add_column(style="dim", no_wrap=True)
        facts.add_column(overflow="fold")
        for name, value in self.checkpoint.items():
            if name != "configuration" and value is not None:
                facts.add_row(name, Text(f"{value:,}" if isinstance(value, int) else str(value)))
        configuration = self.checkpoint.get("configuration", {})
        facts.add_row("configuration", Text(", ".join(f"{name} {value}" for name, value in configuration.items())))
        findings.add_column(no_wrap=True)
        findings.add_column(style="bold", no_wrap=True)
        findings.add_column(overflow="fold")
        colours = {"ok": "green", "note": "yellow", "fail": "red"}
        for check in self.checks:
            findings.add_row(Text(check.verdict, style=colours[check.verdict]), check.name, Text(check.message))
        return facts, findings
