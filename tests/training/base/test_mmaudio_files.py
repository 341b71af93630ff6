"""Files of MMAudio's trainer: its sample checkpoint, what ours looks like beside it, damage."""

from __future__ import annotations

import dataclasses
import zlib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from recipe import load_manifest

from selva.models.variants import VARIANTS
from selva.models.zoo import build_generator
from selva.training.base.mmaudio_files import (
    MMAudioSchedule,
    published_order,
    read_checkpoint,
    read_weights,
    trained_order,
    write_checkpoint,
    write_weights,
)
from selva.utils.errors import UserError

GOLDEN = Path(__file__).parents[2] / "golden"
FILE = GOLDEN / "base_checkpoint" / "tiny_ckpt_last.pth"
SCHEDULE = MMAudioSchedule(lr=1e-4, warmup_steps=2, marks=(2,))  # of the sample


def constant(*keys: str) -> float:
    """Return the value that the sample holds under these keys."""
    return float(torch.tensor(zlib.crc32("/".join((FILE.name, *keys)).encode()) / 2**32, dtype=torch.float64).float())


@pytest.fixture(scope="module")
def names():
    return [entry[0] for entry in load_manifest(GOLDEN / "manifests" / "generator_tiny_v1.json")]


def test_everything_gets_the_name_of_its_parameter(names):
    state = read_checkpoint(FILE)
    trained = [name for name in names if name not in ("latent_mean", "latent_std", "empty_string_feat")]
    assert state.updates == 5 and list(state.weights) == names and len(trained) == 116
    assert list(state.moments["exp_avg"]) == list(state.moments["exp_avg_sq"]) == trained
    for name in names:
        assert (state.weights[name] == constant("weights", name)).all(), name
        for number, track in enumerate(state.tracks):
            assert (track[name] == constant("ema", f"ema_models.{number}.ema_model.{name}")).all(), name
    for number, name in enumerate(trained):
        for moment, values in state.moments.items():
            assert (values[name] == constant("optimizer", "state", str(number), moment)).all(), name
    assert len(state.tracks) == 2 and state.optimizer_settings["eps"] == 1e-6


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("mmaudio_")])
def test_the_order_is_the_published_one(variant):
    manifest = load_manifest(GOLDEN / "manifests" / f"generator_{variant.removeprefix('mmaudio_')}.json")
    with torch.device("meta"):
        own = [name for name, _ in build_generator(variant).named_parameters()]
    published = [name for name, _, _, is_buffer in manifest if not is_buffer]
    assert published_order(own) == published != own
    assert trained_order(own)[0] == "sync_pos_emb" and len(trained_order(own)) == len(own) - 3


def same(one, other, where=""):
    """Assert that two contents of a checkpoint are equal in types, values and the order of parameters."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert set(one) == set(other), where
        assert where != "/weights" or list(one) == list(other)
        for key in one:
            same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            same(*pair, f"{where}/{number}")
    else:
        assert type(one) is type(other) and one == other, f"{where}: {one!r} {other!r}"


def test_what_we_write_is_what_mmaudio_writes(tmp_path):
    write_checkpoint(tmp_path / "ours.pth", read_checkpoint(FILE), SCHEDULE)
    ours, theirs = (torch.load(path, weights_only=True) for path in (tmp_path / "ours.pth", FILE))
    assert list(ours) == ["it", "weights", "optimizer", "scheduler", "ema"]
    same(theirs, ours)


def test_our_order_in_is_theirs_out(tmp_path):
    """Parameters that arrive in the order of our network leave under MMAudio's numbers."""
    state = read_checkpoint(FILE)
    own = sorted(state.weights, key=lambda name: name == "sync_pos_emb")
    mixed = {moment: {name: values[name] for name in own if name in values} for moment, values in state.moments.items()}
    changed = dataclasses.replace(state, weights={name: state.weights[name] for name in own}, moments=mixed)
    write_checkpoint(tmp_path / "ours.pth", changed, SCHEDULE)
    same(torch.load(FILE, weights_only=True), torch.load(tmp_path / "ours.pth", weights_only=True))


@pytest.mark.parametrize("updates", [0, 1, 2, 3, 4, 7])
def test_their_scheduler_goes_on_from_ours(tmp_path, updates):
    """Theirs, loaded with our state, has the rates of one that was never stopped."""
    def objects():
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
        warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (k + 1) / 3)
        steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], 0.1)
        return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, steps], [2])

    def rates(optimizer, scheduler, count):
        seen = []
        for _ in range(count):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen

    expected = rates(*objects(), 10)[updates:]
    write_checkpoint(tmp_path / "ours.pth", dataclasses.replace(read_checkpoint(FILE), updates=updates), SCHEDULE)
    ours = torch.load(tmp_path / "ours.pth", weights_only=True)
    optimizer, scheduler = objects()
    optimizer.param_groups[0]["lr"] = ours["optimizer"]["param_groups"][0]["lr"]
    scheduler.load_state_dict(ours["scheduler"])
    assert rates(optimizer, scheduler, 10 - updates) == pytest.approx(expected, rel=1e-12)


def test_a_long_run_is_not_walked_through(tmp_path):
    state = read_checkpoint(FILE)
    write_checkpoint(tmp_path / "a.pth", dataclasses.replace(state, updates=241_000, tracks=()), MMAudioSchedule())
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    second = content["scheduler"]["_schedulers"][1]
    assert content["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-5)
    assert (content["scheduler"]["last_epoch"], second["last_epoch"]) == (241_000, 240_000)
    assert second["milestones"] == {240_000: 1, 270_000: 1}


def test_a_run_without_averages(tmp_path):
    content = torch.load(FILE, weights_only=True)
    torch.save({**content, "ema": None}, tmp_path / "a.pth")
    state = read_checkpoint(tmp_path / "a.pth")
    write_checkpoint(tmp_path / "b.pth", state, SCHEDULE)
    assert state.tracks == () and torch.load(tmp_path / "b.pth", weights_only=True)["ema"] is None


def test_a_checkpoint_of_the_middle_of_a_run_counts_by_its_scheduler(tmp_path, caplog):
    content = torch.load(FILE, weights_only=True)
    torch.save({**content, "it": 4}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth").updates == 5 and not caplog.records
    torch.save({**content, "it": 3}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth").updates == 5
    assert "says step 3, but its scheduler has counted 5" in caplog.text


def damaged(content, kind):
    if kind == "no scheduler":
        del content["scheduler"]
    elif kind == "a parameter less":
        content["optimizer"]["param_groups"][0]["params"].pop()
    elif kind == "another shape":
        content["optimizer"]["state"][7]["exp_avg"] = torch.zeros(3)
    elif kind == "another count":
        content["ema"]["ema_models.1._extra_state"] = {"initted": True, "step": 4}
    elif kind == "a track less":
        content["ema"] = {key: x for key, x in content["ema"].items() if not key.startswith("ema_models.1")}
    elif kind == "two groups":
        content["optimizer"]["param_groups"] *= 2
    elif kind == "no tensors":
        content["weights"] = {}
    return content


@pytest.mark.parametrize("kind, message", [
    ("no scheduler", "not a training checkpoint of MMAudio, it has no scheduler"),
    ("a parameter less", "the optimiser holds 115 parameters, expected 116"),
    ("another shape", r"exp_avg number 7 is \(3,\), expected"),
    ("another count", "track 1 of ema has seen 4 updates, expected 5"),
    ("a track less", "ema lacks 'ema_models.1._extra_state' of track 1"),
    ("two groups", "not those of MMAudio's trainer"),
    ("no tensors", "weights are not named tensors"),
])
def test_damage_is_named(tmp_path, kind, message):
    torch.save(damaged(torch.load(FILE, weights_only=True), kind), tmp_path / "a.pth")
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(tmp_path / "a.pth")
    assert "a.pth" in str(caught.value)


def test_no_code_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    content = torch.load(FILE, weights_only=True)
    torch.save({**content, "it": Evil()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="nothing in it was executed"):
        read_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights(tmp_path, names, suffix):
    from selva.weights.load import read_checkpoint as read_weight_file

    weights = read_weights(FILE.with_name("tiny_last.pth"))
    assert list(weights) == names
    assert read_weights(FILE).keys() == weights.keys()
    path = tmp_path / f"ours{suffix}"
    write_weights(path, weights)
    found = read_weight_file(path)
    assert found.keys() == weights.keys() and all(torch.equal(found[name], x) for name, x in weights.items())
    with pytest.raises(UserError, match=r"as .pth or .safetensors, not .bin"):
        write_weights(tmp_path / "a.bin", weights)


def test_old_tables_are_left_out(tmp_path):
    content = OrderedDict(torch.load(FILE.with_name("tiny_last.pth"), weights_only=True))
    content["t_embed.freqs"] = torch.zeros(3)
    torch.save(content, tmp_path / "a.pth")
    assert "t_embed.freqs" not in read_weights(tmp_path / "a.pth")
