"""benchmarks/findings.py: intervals, verdicts, and the document that is made of rows."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillWaiting

import findings
import numpy as np
import pytest
import sound_data
import yaml
from sound_plan import read_plan
from sound_rows import append_row, compared, interval, read_rows, steps_to
from test_soundbench import PLAN

from selva.utils.errors import UserError
from selva.utils.lock import file_lock


def row(plan, method: str, sound: str, seed: int, new: str, known: str = "1111", seconds: float = 70.0) -> dict:
    part = {"timing_f1": 0.9, "distance_db": 7.0, "distances_db": [6.0, 8.0, 7.0, 7.0]}
    return {
        "key": f"select-{sound}-20-{seed}-{plan.methods[method].identity}", "method": method, "scenes": "select",
        "sound": sound, "clips": 20, "seed": seed, "train_cpu_sec": seconds, "preserve_cpu_sec": 10.0,
        "base": {"new": {"hits": "0000", "distances_db": [20.0, 22.0, 30.0, 30.0]}, "known": {"hits": "1110"}},
        "checkpoints": [
            {"step": 2, "val_loss": 1.25, "member_auc": 0.5, "new": {"hits": "01"}, "known": {"hits": "1"}},
            {"step": 4, "val_loss": 1.5, "member_auc": 0.5,
             "new": {**part, "hits": new, "recognised": new.count("1") / len(new)},
             "known": {**part, "hits": known}},
        ],
        "response": [{"strength": 0.2, "scenes": 2, "recognised": 0.25, "distance_db": 15.0},
                     {"strength": 1.4, "scenes": 2, "recognised": 0.75, "distance_db": 5.0}],
    }


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN, sort_keys=False))
    return read_plan(tmp_path / "plan.yaml")


def document(tmp_path, rows, *options: str) -> str:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert findings.main(["--results", str(tmp_path / "rows.jsonl"), "--plan", str(tmp_path / "plan.yaml"),
                          "--document", str(tmp_path / "findings.md"), *options]) == 0
    return (tmp_path / "findings.md").read_text()


def cells(text: str, method: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {method} | ") and line.count("|") > 12]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_interval_of_a_mean_holds_both_kinds_of_chance():
    assert interval([[0.5]]) == (one := interval([[0.5]])) and one.low is None and one.mean == 0.5
    equal = interval([[0, 1] * 12, [0, 1] * 12])
    apart = interval([[0] * 24, [1] * 24])
    assert equal.mean == apart.mean == 0.5
    assert apart.low == 0 and apart.high == 1  # of two runs, both may be the same one
    assert 0.3 < equal.low < 0.45 < 0.55 < equal.high < 0.7  # two times 24 scenes of a fair coin
    width = interval([[0, 1] * 1000]).high - interval([[0, 1] * 1000]).low
    assert width == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(2000), rel=0.1)


def test_a_difference_is_taken_scene_by_scene_on_the_cells_that_both_have(plan):
    ours = [row(plan, "faster", "gong", 1, "1110"), row(plan, "faster", "bird", 1, "1111")]
    reference = [row(plan, "plain", "gong", 1, "0110"), row(plan, "plain", "gong", 2, "0000")]
    found = compared(ours, reference, findings.recognised)
    assert found.mean == 0.25 and 0 <= found.low < found.high <= 1


def test_no_verdict_before_there_are_enough_runs(tmp_path, plan):
    rows = [row(plan, name, "gong", 1, hits) for name, hits in (("plain", "0000"), ("faster", "1111"))]
    text = document(tmp_path, rows, "--decided_after", "2")
    assert cells(text, "faster")[-1] == "not decided yet: 1 of 2 runs" and cells(text, "plain")[-1] == "the reference"
    assert "Not run here: kept." in text and not any(line.startswith("| kept |") for line in text.splitlines())
    assert "On the base `small`: plain: `--preserve`; faster: `--preserve`, `--lr 0.01`. Not" in text
    assert "- `small`: `--variant tiny_16k` `--rank 2` " in text and "rslora" not in text  # what is off is no flag


def test_verdicts_follow_from_the_intervals(tmp_path, plan):
    def verdict(new: str, known: str, seconds: float = 70.0) -> str:
        rows = [one for seed in range(1, 5) for one in (
            row(plan, "plain", "gong", seed, "0011", "1111"), row(plan, "faster", "gong", seed, new, known, seconds))]
        return cells(document(tmp_path, rows, "--decided_after", "4"), "faster")[-1]

    assert verdict("0011", "1111") == "no difference beyond the intervals"
    assert verdict("1111", "1111") == "learns more"
    assert verdict("0000", "1111") == "learns less"
    assert verdict("1111", "0000") == "learns more, keeps less"
    assert verdict("0011", "1111", 35.0) == "no difference beyond the intervals, 0.5 times the seconds"


def test_seconds_are_compared_on_the_same_processor(plan):
    def rows(method: str, *seconds: float) -> list[dict]:
        made = (row(plan, method, "gong", seed, "0011", seconds=one) for seed, one in enumerate(seconds, 1))
        return [{**one, "processor": "slow" if one["train_cpu_sec"] > 99 else "fast"} for one in made]

    assert findings.cost_ratio(rows("faster", 20, 30, 200), rows("plain", 40, 50, 80)) == 50 / 90
    assert findings.cost_ratio(rows("faster", 200), rows("plain", 40)) is None
    preserving_none = [{**one, "preserve_cpu_sec": 0.0} for one in rows("faster", 20)]
    assert findings.cost_ratio(preserving_none, rows("plain", 40)) is None  # the making of sounds does not count
    told = findings.verdict(rows("faster", 200, 200), rows("plain", 40, 40), 2)
    assert told == "no difference beyond the intervals"


def test_all_verdicts_stand_in_one_table_as_soon_as_there_are_several(tmp_path, plan, monkeypatch):
    rows = [{**row(plan, name, "gong", seed, hits), "processor": f"P{seed}"}
            for seed in (1, 2) for name, hits in (("plain", "0000"), ("faster", "1111"))]
    text = document(tmp_path, rows, "--decided_after", "2")
    assert "### At a glance" not in text and "4 runs so far, on P1, P2.\n" in text
    monkeypatch.setattr(findings, "OVERVIEW_FROM", 1)
    overview = document(tmp_path, rows, "--decided_after", "2").split("### At a glance")[1].split("### ")[0]
    (line,) = [line for line in overview.splitlines() if "faster" in line]
    assert line.startswith("| T | faster | `--preserve`, `--lr 0.01` | 2 | +100 (+100 to +100) | +0 (+0 to +0) |")
    assert line.endswith(" | learns more |") and "plain |" not in overview


def test_a_verdict_says_what_sounds_nearer_to_the_true_sounds(plan):
    def rows(method: str, nearer_by: float) -> list[dict]:
        made = [row(plan, method, "gong", seed, "0011") for seed in range(1, 5)]
        for one in made:
            part = one["checkpoints"][-1]["new"]
            part["distances_db"] = [distance - nearer_by for distance in part["distances_db"]]
        return made

    assert findings.verdict(rows("faster", 0.5), rows("plain", 0.0), 4) == "sounds nearer"
    assert findings.verdict(rows("faster", -0.5), rows("plain", 0.0), 4) == "sounds less near"


def test_scenes_in_other_words_than_those_of_the_clips_stand_apart(tmp_path, plan, monkeypatch):
    monkeypatch.setattr(sound_data, "trained_wordings", lambda cell, *_: [True, True, True, cell.seed == 2])
    rows = [row(plan, "plain", "gong", 1, "0110"), row(plan, "plain", "gong", 2, "1110"),
            row(plan, "faster", "gong", 2, "1110")]
    text = document(tmp_path, rows).split("### Other words")[1].split("### ")[0]
    assert "| plain | 2 | 7 | 71 | 1 | 0 |" in text and "faster" not in text


def test_the_document_says_what_was_found(tmp_path, plan):
    rows = [row(plan, "plain", "gong", 1, "0011", "0111"), row(plan, "plain", "bird", 1, "1111"),
            row(plan, "faster", "gong", 1, "0111")]
    text = document(tmp_path, rows)
    plain, faster = cells(text, "plain"), cells(text, "faster")
    assert plain[1] == "2" and plain[2].startswith("75 (") and plain[4] == "50"
    assert plain[5].startswith("83 (") and plain[7] == "67"  # of the three that the base model gets right
    assert plain[8:13] == ["0.90, 0.90", "0.50", "7.00", "", "80 s"] and faster[11] == "+0.00 (+0.00 to +0.00)"
    assert faster[12] == "x 1.00"
    assert faster[3].startswith("+25 (") and faster[6].startswith("+25 (")
    assert "*Claim:* C *From:* S." in text and "Verdict:" not in text
    assert "faster: `--preserve`, `--lr 0.01`" in text
    assert "| gong | 2 | 0 | 62 | 75 |  |  |" in text  # rows of earlier versions have no ceiling
    with_ceiling = [{**one, "ceiling": {"recognised": 0.95, "distance_db": 5.81}} for one in rows]
    assert "| gong | 2 | 0 | 62 | 75 | 95 | 5.8 |" in document(tmp_path, with_ceiling)
    assert "| plain | 2 | 0 | 25 | 50 | 75 |" in text  # strengths 0, 0.2, 1 and 1.4, on the first two scenes
    assert "| plain | 2 | 21.0 | 15.0 | 7.0 | 5.0 |" in text
    assert "| plain | 2 | 2 | 50 | 100 | 0 | 1.250 | 0.50 |" in text
    assert "| plain | 2 | 4 | 50 | 50 | 1 | 1.500 | 0.50 |" in text  # on the first two new scenes, and one known one
    # Scores of the two checkpoints: 75 and 0 points, 75 and 100, 75 and 75.
    assert "| the last | 2 of 3 | 25 (0 to 75) | 75 |" in text
    assert "| lowest held-out loss | 2 of 3 | 8 (0 to 25) | 25 |" in text
    again = document(tmp_path, rows)
    assert again == text and again.count(findings.BEGIN_MARK) == 1
    decided = {**PLAN, "questions": {"one": {**PLAN["questions"]["one"], "verdict": "default."}}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(decided, sort_keys=False))
    assert "\n\n**Verdict:** default.\n\n### " in document(tmp_path, rows)


def test_the_steps_that_a_sound_needs_are_counted_on_the_same_scenes():
    def row(*found: str) -> dict:
        return {"checkpoints": [{"step": 10 * (i + 1), "new": {"hits": one}} for i, one in enumerate(found)]}

    assert steps_to(row("10", "11", "1000")) == 20 and steps_to(row("10", "11", "1000"), 0.5) == 10
    assert steps_to(row("10", "1000")) is None and steps_to(row("01", "1100")) == 20
    assert steps_to(row("1111")) == 10


def test_the_price_of_patience_is_told(plan):
    """The loss rises twice and falls again: patience of one and two checkpoints ends before the better sounds."""
    losses = (5.0, 4.0, 4.5, 4.5, 3.0, 3.5)
    one = row(plan, "plain", "gong", 1, "1111")
    one["checkpoints"] = [{"step": 10 * number, "val_loss": loss, "member_auc": 0.5, "known": {"hits": "1"},
                           "new": {"hits": "1" if loss < 4 else "0"}} for number, loss in enumerate(losses, 1)]
    lines = [line.strip("| ").split(" | ") for line in findings.patience_text([one]).splitlines()[-4:]]
    assert lines == [["1", "1 of 1", "50", "+50", "50"], ["2", "1 of 1", "67", "+50", "50"],
                     ["3", "0 of 1", "100", "+0", "0"], ["4", "0 of 1", "100", "+0", "0"]]
    assert findings.patience_text([row(plan, "plain", "gong", 1, "1111")]) == ""


def test_rows_of_other_scenes_and_numbers_of_clips_stand_apart(tmp_path, plan):
    other = {**row(plan, "faster", "gong", 1, "1111"), "scenes": "judge"}
    few = {**row(plan, "faster", "gong", 1, "1111"), "clips": 5}
    earlier = {**row(plan, "faster", "gong", 1, "1111"), "scenes": "first"}
    text = document(tmp_path, [earlier, row(plan, "plain", "gong", 1, "0000"), other, few])
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Bases",
        "## 20 clips, scenes that were used for nothing else", "## 20 clips, scenes that settings were chosen by",
        "## 5 clips, scenes that settings were chosen by",
        "## 20 clips, the same scenes, heard by the judge as it was before the violin was changed",
    ]


def test_a_method_that_was_judged_alone_has_its_table(tmp_path, plan):
    judged = {**row(plan, "plain", "gong", 1, "0111"), "scenes": "judge"}
    judged["checkpoints"] = judged["checkpoints"][1:]
    text = document(tmp_path, [judged])
    assert cells(text, "plain")[2].startswith("75 (") and cells(text, "plain")[-1] == "the reference"
    assert "### Along the way" not in text and "### Which checkpoint" not in text


def test_rows_are_read_by_their_settings_not_by_their_names(tmp_path, plan):
    renamed = {**row(plan, "faster", "gong", 1, "1111"), "method": "an older name"}
    changed = {**row(plan, "faster", "gong", 2, "0000"), "key": "select-gong-20-2-0123456789"}
    text = document(tmp_path, [row(plan, "plain", "gong", 1, "0000"), renamed, changed])
    assert cells(text, "faster")[1] == "1" and cells(text, "faster")[2].startswith("100")


def test_without_rows_there_are_no_findings(tmp_path, plan, capsys):
    assert findings.main(["--results", str(tmp_path / "none.jsonl"), "--plan", str(tmp_path / "plan.yaml")]) == 1
    assert "no rows" in capsys.readouterr().err


def test_rows_are_added_one_after_the_other_and_none_twice(tmp_path):
    """The lock is that of a file, so it holds between threads as it does between processes."""
    path = tmp_path / "deeper" / "rows.jsonl"
    assert append_row(path, {"key": "a"}) and not append_row(path, {"key": "a", "other": 1})
    with ThreadPoolExecutor(1) as pool:
        with file_lock(path.with_name(".rows.jsonl.lock")):
            adding = pool.submit(append_row, path, {"key": "b"})
            with pytest.raises(StillWaiting):
                adding.result(timeout=0.3)
            path.write_text(path.read_text() + '{"key":"b"}\n')  # what the holder of the lock adds is seen by the other
        assert adding.result() is False and [row["key"] for row in read_rows(path)] == ["a", "b"]


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"key": "a"}\n{"key": \n')
    with pytest.raises(UserError, match="line 2 is no JSON"):
        read_rows(tmp_path / "rows.jsonl")
