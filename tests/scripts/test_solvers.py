"""benchmarks/solvers.py: solvers and guidance intervals against many-step Euler."""

from __future__ import annotations

import json

from script_args import TINY

from benchmarks import solvers


def test_a_small_comparison(tmp_path, capsys):
    out = tmp_path / "solvers.json"
    arguments = ["--duration", "0.64", "--evaluations", "3", "4", "--reference_steps", "8", "--num_steps", "6",
                 "--num_seeds", "1", "--output", str(out)]
    assert solvers.main([*TINY, *arguments]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(out) and sum(line.startswith("| evaluations") for line in printed) == 1
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    ran = [(row["solver"], row["num_steps"], row["evaluations"]) for row in results if row["cfg_interval"] == [0, 1]]
    # Half the reference's steps, which the four evaluations of Euler happen to be; three do not suit midpoint and Heun.
    assert ran == [("euler", 4, 4), ("euler", 3, 3), ("ab2", 3, 3), ("midpoint", 2, 4), ("heun", 2, 4), ("ab2", 4, 4),
                   ("euler", 6, 6)]
    errors = {(row["solver"], row["num_steps"]): row["error_db"] for row in results if row["cfg_interval"] == [0, 1]}
    assert errors["euler", 3] > errors["euler", 6]
    passes = {tuple(row["cfg_interval"]): row["passes"] for row in results if row["num_steps"] == 6}
    assert passes[0.0, 1.0] == 12 and passes[0.2, 0.8] == 6 + 3  # of 0, 1/6, … 5/6 three lie inside
    assert len(results) == len(ran) + len(solvers.INTERVALS) - 1
