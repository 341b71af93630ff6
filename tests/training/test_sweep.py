"""selva.training.sweep: the file of a sweep, and ranking."""

from __future__ import annotations

from pathlib import Path

import pytest

from selva.training.sweep import RunResult, SweepRun, ranked, read_sweep, remarks, table_rows


def put(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def names(path: Path, text: str) -> list[str]:
    return [run.name for run in read_sweep(put(path / "s.yaml", f"output_dir: out\n{text}"))[1]]


def test_a_grid_is_every_combination_with_every_seed(tmp_path):
    found = names(tmp_path, "seeds: 2\ngrid: {lr: [1e-4, 0.001], rank: [4]}\nbase: {variant: tiny_16k}")
    assert found == ["lr=1e-4,rank=4,seed=42", "lr=1e-4,rank=4,seed=43", "lr=0.001,rank=4,seed=42",
                     "lr=0.001,rank=4,seed=43"]
    _, runs = read_sweep(tmp_path / "s.yaml")
    assert runs[1].settings == {"variant": "tiny_16k", "lr": "1e-4", "rank": 4, "seed": 43}


def test_variations_are_one_at_a_time_and_lists_as_they_are(tmp_path):
    assert names(tmp_path, "vary: {lr: [1, 2], target: [[attn, linear1:4]]}") == [
        "base,seed=42", "lr=1,seed=42", "lr=2,seed=42", "target=attn+linear1_4,seed=42"]
    assert names(tmp_path, "seeds: [7]\nruns: [{rank: 2}, {rank: 4, lr: 1}]") == ["rank=2,seed=7", "rank=4,lr=1,seed=7"]
    assert names(tmp_path, "seeds: 2") == ["base,seed=42", "base,seed=43"]


def test_a_base_may_be_the_settings_of_an_old_run(tmp_path):
    put(tmp_path / "config.yaml", "rank: 8\noutput_dir: old\nseed: 5\nresume: null\ncheckpoint_blocks: null\n")
    _, runs = read_sweep(put(tmp_path / "s.yaml", "output_dir: out\nbase: config.yaml\nruns: [{lr: 1}]"))
    assert runs[0].settings == {"rank": 8, "lr": 1, "seed": 42}


def test_a_base_may_be_a_file_and_settings_that_win_over_it(tmp_path):
    put(tmp_path / "preset.yaml", "rank: 8\nlr: 2.0e-4\n")
    text = "output_dir: out\nbase: {config: preset.yaml, rank: 4}\nruns: [{lr: 1}, {dora: true}]"
    path = put(tmp_path / "s.yaml", text)
    assert [run.settings for run in read_sweep(path)[1]] == [
        {"rank": 4, "lr": 1, "seed": 42}, {"rank": 4, "lr": 2.0e-4, "dora": True, "seed": 42}]
    with pytest.raises(FileNotFoundError, match=r"base gone\.yaml: no such file"):
        read_sweep(put(path, "output_dir: out\nbase: {config: gone.yaml}\nruns: [{lr: 1}]"))


def test_another_output_folder_goes_before_that_of_the_file(tmp_path):
    path = put(tmp_path / "s.yaml", "output_dir: out\nseeds: 2")
    assert read_sweep(path)[0] == Path("out") and read_sweep(path, tmp_path)[0] == tmp_path
    assert read_sweep(put(path, "seeds: 2"), tmp_path)[0] == tmp_path  # and is enough


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {lr: [1]}\nruns: [{lr: 1}]\noutput_dir: o", "give one of grid, vary and runs, found grid and runs"),
        ("output_dir: o", "found none"),
        ("grid: {lr: [1]}", "output_dir is None"),
        ("gird: {lr: [1]}\noutput_dir: o", "unknown keys gird"),
        ("grid: {lr: 1}\noutput_dir: o", "expected a list of values"),
        ("grid: {seed: [1]}\noutput_dir: o", "seed cannot be varied"),
        ("runs: [{lr: 1}, {lr: 1}]\noutput_dir: o", "there twice: lr=1,seed=42"),
        ("runs: [{lr: 1}]\nseeds: x\noutput_dir: o", "seeds is 'x'"),
        ("runs: [{lr: 1}]\nseeds: 0\noutput_dir: o", "seeds is 0"),
        ("- 1", "holds a list"),
        ("a: [", "cannot be read as YAML"),
        ("grid: {steps: [0500]}\noutput_dir: o", "steps is 0500, which YAML reads as 320"),
        ("seeds: 2\nbase: {lr: 1}\nbase: {lr: 2}\noutput_dir: o", "base stands in line 2 and again in line 3"),
    ],
)
def test_wrong_files_are_explained(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"s\.yaml.*{message}"):
        read_sweep(put(tmp_path / "s.yaml", text))


def result(setup: str, seed: int, loss: float = 0.0, problem: str = "") -> RunResult:
    figures = {} if problem else {"val_loss": loss, "best_step": 20, "steps": 40, "train_loss": 0.5}
    return RunResult(SweepRun(setup, seed, {}), Path("out"), problem, figures)


def test_setups_are_ranked_by_their_mean_and_failures_come_last():
    scores = ranked([result("a", 1, 2.0), result("a", 2, 4.0), result("b", 1, 1.0), result("b", 2, 3.0),
                     result("c", 1, 0.1), result("c", 2, problem="out of memory")])
    assert [(one.setup, one.mean) for one in scores] == [("b", 2.0), ("a", 3.0), ("c", 0.1)]
    assert scores[0].best.run.seed == 1 and scores[0].spread == pytest.approx(2**0.5)
    rows = table_rows(scores)
    assert rows[3][4] == "-"  # one run tells no spread
    assert rows[1][:4] == ["1", "b", "2", "2.0000"] and rows[3][-1] == "seed 2: out of memory"


def test_equal_means_share_a_rank():
    scores = ranked([result("a", 1, 2.0), result("b", 1, 2.00001), result("c", 1, 3.0)])
    assert [row[0] for row in table_rows(scores)[1:]] == ["1", "1", "3"]
    assert remarks(scores) == ["a tie for the first place: a, b"]


def test_failed_setups_share_no_rank():
    assert [row[0] for row in table_rows(ranked([result("a", 1, problem="x"), result("b", 1, problem="x")]))[1:]] == [
        "1", "2"]
    assert remarks(ranked([result("a", 1, problem="x")])) == []


def test_it_is_said_where_no_setting_is_better_than_the_base():
    assert "no setting is better than the base" in remarks(ranked([result("base", 1, 1.0), result("a", 1, 2.0)]))
    assert "no setting is better than the base" in remarks(ranked([result("a", 1, 1.0), result("base", 1, 1.0)]))
    assert remarks(ranked([result("a", 1, 1.0), result("base", 1, 2.0)])) == []


def test_a_lead_within_the_spread_of_the_seeds_is_no_difference():
    close = ranked([result("a", 1, 1.0), result("a", 2, 2.0), result("b", 1, 1.1), result("b", 2, 2.2)])
    assert remarks(close) == ["a leads b by 0.1500, less than the spread between seeds (0.7778): this is no difference"]
    far = ranked([result("a", 1, 1.0), result("a", 2, 1.1), result("b", 1, 3.0), result("b", 2, 3.1)])
    assert remarks(far) == []


def test_runs_that_never_beat_the_base_model_are_said():
    one = result("a", 1, 1.0)
    one = RunResult(one.run, one.folder, "", {**one.figures, "best_step": 0})
    assert "no run came below the loss that the base model has before the first step" in remarks(ranked([one]))[0]
