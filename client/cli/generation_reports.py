"""What ``xditd generate`` prints in the end: what was made, of what, and how long it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xditd.client.cli.printing import json_text
from xditd.client.cli.tables import copied_by_kind, copied_text, size_text, span_text

if TYPE_CHECKING:
    from xditd.client.cli.generations import Outputs
    from xditd.client.loans import Loan
    from xditd.client.results import GenerationResult


@dataclass(frozen=True, kw_only=True)
class GenerationReport:
    """One generation: the files that were written, its result, and the seconds of lending before it."""

    outputs: Outputs
    generation: GenerationResult
    seed: int | None
    lend_s: float

    def json(
        self,
        *,
        source: Mapping[str, object],
        sampling: Mapping[str, object],
        loras: Sequence[Mapping[str, object]],
        components: Sequence[Mapping[str, object]],
    ) -> str:
        """Format it for programs. ``source`` says what it was made of: a model, or the shapes of a conditioning."""
        outputs, generation = self.outputs, self.generation
        report = {
            "videos" if outputs.is_video else "images": [str(path) for path in outputs.images],
            "latents": None if outputs.latents is None else str(outputs.latents),
            "seed": self.seed,
            **source,
            "sampling": sampling,
            "loras": loras,
            "seconds": {"lend": self.lend_s, "generate": self._generate_s},
            "timings_ms": generation.timings_ms,
            "reused_steps": generation.reused_steps,
            "components": components,
        }
        return json_text(report, indent=2)

    def text(self, loans: Sequence[tuple[str, Loan]], *, steps: int, has_step_cache: bool) -> str:
        """Format it for people: a line for each loan, by the name that it has in front of it, and one of the files."""
        lines = []
        for name, loan in loans:
            tiers = "+".join(tier.value for tier in loan.tiers)
            lines.append(f"{name}{size_text(loan.lent_bytes)} by {tiers}, copied: {copied_text(loan.copied)}")
        written = ", ".join(str(path) for path in (*self.outputs.images, self.outputs.latents) if path is not None)
        reused = f", {self.generation.reused_steps} of {steps} steps reused" if has_step_cache else ""
        spans = f"lent in {span_text(self.lend_s)}, generated in {span_text(self._generate_s)}"
        return "\n".join([*lines, f"{written}: seed {self.seed}, {spans}{reused}"])

    @property
    def _generate_s(self) -> float:
        return self.generation.timings_ms["round_trip"] / 1e3


def describe_loan(loan: Loan) -> dict[str, object]:
    """Describe a loan for JSON."""
    return {
        "name": loan.label,
        "kind": loan.kind.value,
        "family": loan.family,
        "dtype": loan.facts.dtype,
        "tier": "+".join(tier.value for tier in loan.tiers),
        "bytes": loan.lent_bytes,
        "bytes_by_format": loan.facts.bytes_by_format,
        "bytes_copied": copied_by_kind(loan.copied),
        "is_reused": loan.is_reused,
        "is_model_reused": loan.is_model_reused,
        "timings_ms": loan.timings_ms,
    }
