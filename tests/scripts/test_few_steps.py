"""benchmarks/few_steps.py: which settings it compares, what they cost, and that figures are kept and added to."""

from __future__ import annotations

import json
from types import SimpleNamespace

import few_steps
import torch
from few_steps import SamplingConfig, network_passes, settings_to_compare, table

from selva.lora.merge import Adapter


def test_every_solver_is_compared_at_the_same_number_of_evaluations():
    configs = settings_to_compare([8, 25])
    plain = [(config.solver, config.num_steps) for config in configs if config.cfg_interval == (0.0, 1.0)]
    assert plain == [("euler", 25), ("midpoint", 12), ("heun", 12), ("ab2", 25),
                     ("euler", 8), ("midpoint", 4), ("heun", 4), ("ab2", 8)]
    assert SamplingConfig(8, solver="ab2", cfg_interval=(0.2, 1.0)) in configs


def test_guidance_counts_twice():
    assert network_passes(SamplingConfig(10)) == 20
    assert network_passes(SamplingConfig(10, solver="ab2", cfg_interval=(0.7, 0.8))) == 12
    assert network_passes(SamplingConfig(2, solver="heun", cfg_interval=(0.5, 1.0))) == 4 + 3


def test_differences_are_scene_by_scene():
    default, few = SamplingConfig(), SamplingConfig(8, solver="ab2")
    rows = {default: {"error_db": [-20.0], "hits": [1, 1, 0, 1], "timing_f1": [1.0, 0.5, 0.5, 1.0]},
            few: {"error_db": [-10.0, -14.0], "hits": [1, 0, 0, 1], "timing_f1": [0.5, 0.5, 0.5, 0.5]}}
    lines = table(rows).splitlines()
    assert lines[2] == "| euler | 25 | 0 to 1 | 25 | 100 % | -20.0 | 75 |  | 0.750 |  |"
    assert lines[3] == ("| ab2 | 8 | 0 to 1 | 8 | 32 % | -12.0 | 50 | -25 (-75 to +0) | 0.500 "
                        "| -0.250 (-0.500 to +0.000) |")


class StandIn:
    def __init__(self, args, adapters) -> None:
        self.asked: list[SamplingConfig] = []
        made.append(self)

    def row(self, config: SamplingConfig) -> dict[str, list[float]]:
        self.asked.append(config)
        return {"error_db": [-10.0], "hits": [1, 0], "timing_f1": [1.0, 0.5]}


made: list[StandIn] = []


def test_figures_are_added_to_and_go_into_the_document(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(few_steps, "Bench", StandIn)
    made.clear()
    page, out = tmp_path / "page.md", tmp_path / "out.json"
    page.write_text("above\n\n<!-- figures: benchmarks/few_steps.py -->\nold\n<!-- end of figures -->\nbelow\n")
    call = ["--output", str(out), "--document", str(page)]
    assert few_steps.main([*call, "--evaluations", "8"]) == 0
    assert few_steps.main([*call, "--evaluations", "8", "12"]) == 0
    assert few_steps.main([*call, "--evaluations", "8", "12"]) == 0
    first, second = made  # nothing was missing the third time
    assert SamplingConfig() in first.asked and len(first.asked) == 9
    # Half-work guidance goes with the evaluations nearest to 12; solvers that take two per step come last.
    assert second.asked == [
        SamplingConfig(12), SamplingConfig(12, solver="ab2"), SamplingConfig(12, solver="ab2", cfg_interval=(0.2, 1.0)),
        SamplingConfig(6, solver="midpoint"), SamplingConfig(6, solver="heun")]
    text = page.read_text()
    assert "above" in text and "below" in text and "old" not in text and "60 scenes" in text
    assert text.count("| ab2 | 12 |") == 2 and len(json.loads(out.read_text())) == 14
    assert few_steps.main([*call, "--evaluations", "8", "--unguided"]) == 0  # other scenes, and no intervals
    assert len(made[-1].asked) == 5 and "known classes, 8 s each, without guidance" in page.read_text()


def test_scenes_of_adapters_have_a_table_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(few_steps, "Bench", StandIn)
    made.clear()
    out, keys = tmp_path / "out.json", ["judge-gong-20-1-abc", "judge-bird-20-1-abc"]
    call = ["--output", str(out), "--document", "", "--evaluations", "8", "--work", str(tmp_path)]
    assert few_steps.main(call) == 0
    assert few_steps.main([*call, "--keys", *keys]) == 1
    assert "judge-bird-20-1-abc.pt" in capsys.readouterr().err
    (tmp_path / "adapters").mkdir()
    others = ["judge-gong-20-2-abc", "judge-bird-20-2-abc"]
    for key in keys + others:
        (tmp_path / "adapters" / f"{key}.pt").touch()
    assert few_steps.main([*call, "--solvers", "ab2", "--keys", *keys]) == 0
    told = capsys.readouterr().out
    known, new = told.split("60 scenes of the ten known classes, 8 s each; the error is over 1 of them.")
    assert "| heun | 4 |" in known and "| heun |" not in new and "| ab2 | 8 |" in new
    assert "24 scenes for each of 2 adapters for new sounds (gong, bird), 8 s each; the error is over 1 of them." in new
    assert few_steps.main([*call, "--solvers", "ab2", "--keys", *keys]) == 0
    assert len(made) == 2  # nothing was missing
    assert few_steps.main([*call, "--solvers", "ab2", "euler", "--keys", *keys]) == 0
    assert few_steps.main([*call, "--solvers", "ab2", "--keys", *others]) == 0
    told = capsys.readouterr()
    assert f"7 settings of other adapters, {keys[0]}, {keys[1]}: measured anew with these" in told.err
    rows = json.loads(out.read_text())
    assert len(made[3].asked) == len(made[1].asked) == 6  # of other adapters, though of the same sounds
    assert {tuple(row["keys"]) for row in rows.values()} == {(), tuple(others)}
    assert all(row["commit"] and row["processor"] and row["threads"] for row in rows.values())


def test_the_adapter_is_in_force_for_its_scenes_only(tmp_path):
    """Of two sets of the same scenes, that without an adapter is made by the base model, before and after."""
    generator = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    generator.normalize = lambda x: x
    adapter = Adapter({"0.lora_A": torch.eye(2), "0.lora_B": torch.eye(2)}, {"rank": 2, "alpha": 2})
    bench = few_steps.Bench.__new__(few_steps.Bench)
    bench.args = SimpleNamespace(duration=8.0, unguided=False)
    bench.generator = generator
    bench.maker = SimpleNamespace(latents=lambda model, scenes, seconds, sampling: model[0].weight.detach().clone())
    base, own = few_steps.SceneSet([], []), few_steps.SceneSet([], [], adapter)
    before, adapted, after = (bench.latents(scenes, SamplingConfig()) for scenes in (base, own, base))
    assert torch.equal(before, after) and torch.allclose(adapted, before + torch.eye(2))
    bench.args.unguided, asked = True, []
    bench.maker.latents = lambda *given, sampling: asked.append(sampling)
    bench.latents(base, SamplingConfig(12, solver="ab2"))
    assert asked == [SamplingConfig(12, 0.0, "ab2")]


def test_what_is_not_measured_yet_is_named_and_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(few_steps, "Bench", StandIn)
    made.clear()
    out = tmp_path / "out.json"
    call = ["--output", str(out), "--document", "", "--evaluations", "8"]
    assert few_steps.main([*call, "--measured_only"]) == 1
    assert few_steps.main(call) == 0
    figures = json.loads(out.read_text())
    out.write_text(json.dumps({name: row for name, row in figures.items() if not name.startswith("heun")}))
    capsys.readouterr()
    assert few_steps.main([*call, "--measured_only"]) == 0
    told = capsys.readouterr()
    assert "not measured yet: heun 4; 60 scenes of the ten known classes, 8 s each" in told.err
    assert "| heun |" not in told.out and "| ab2 |" in told.out
    assert len(made) == 1
