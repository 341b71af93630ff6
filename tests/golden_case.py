"""Golden files of the reference, and the comparison with them."""

from __future__ import annotations

from pathlib import Path

import torch
from recipe import compare, load_golden, load_manifest, make_input, make_state_dict, select

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_ERRORS: dict[str, dict[str, float]] = {}  # golden file -> worst errors of this run, shown at its end


def note_golden_errors(name: str, errors: dict[str, float]) -> None:
    worst = GOLDEN_ERRORS.setdefault(name, dict.fromkeys(errors, 0.0))
    worst.update({key: max(value, worst[key]) for key, value in errors.items()})


class GoldenCase:
    """One golden file: its configuration, weights, inputs and expected outputs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.info, self.stored = load_golden(GOLDEN / name)
        self.config = self.info.get("config", {})

    def inputs(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(make_input(spec)) for name, spec in self.info["inputs"].items()}

    def weights(self, manifest: str | None = None) -> dict[str, torch.Tensor]:
        entries = load_manifest(GOLDEN / (manifest or self.info["manifest"]))
        return {name: torch.from_numpy(value) for name, value in make_state_dict(entries).items()}

    def check(self, name: str, actual: torch.Tensor) -> None:
        """Compare the full tensor ``actual`` with stored output ``name`` within its own tolerance."""
        spec = self.info["outputs"][name]
        found = select(actual.detach().to(torch.float32).cpu().numpy(), spec.get("index"))
        error = compare(found, self.stored[name])
        note_golden_errors(self.name, error)
        limit = spec["tolerance"]
        assert error["rel_l2"] <= limit["rel_l2"] and error["max_abs"] <= limit["max_abs"], (
            f"{self.name}/{name}: error {error}, tolerance {limit}"
        )
