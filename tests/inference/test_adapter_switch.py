"""selva.inference.adapter_switch: adapters come and go, and the base weights stay what they were."""

from __future__ import annotations

import pytest
import torch
from tiny_adapter import make_adapter

from selva.flow import WHOLE_INTERVAL
from selva.inference.adapter_switch import AdapterSwitch, warn_of_missing_prefixes
from selva.lora.merge import Adapter
from selva.weights.load import load_generator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expected", [True, False])
def test_exchanged_adapters_leave_no_trace(dtype, expected):
    """Every exchange gives the bits of a fresh model, convolutions and DoRA included."""
    plain = make_adapter(1, ("attn.qkv", "linear1"))
    dora = make_adapter(2, ("attn.qkv", "text_block.linear1"), dora=True)
    settings = [[], [(plain, 0.7)], [(dora, 1.0), (plain, 0.3)], [(plain, 0.0)], [(dora, -0.5)], [(plain, 0.7)], []]

    def load():
        return load_generator("tiny_16k")

    switch = AdapterSwitch(load, dtype, torch.device("cpu"))
    if expected:
        switch.expect([plain, dora])
    for setting in settings:
        fresh = AdapterSwitch(load, dtype, torch.device("cpu")).set(setting).state_dict()
        exchanged = switch.set(setting).state_dict()
        for key, value in fresh.items():
            assert exchanged[key].dtype == value.dtype and torch.equal(exchanged[key], value), (key, setting)


def test_announced_adapters_are_exchanged_without_reading_the_weights_again():
    loads = []

    def load():
        loads.append(1)
        return load_generator("tiny_16k")

    a, b = make_adapter(1), make_adapter(2, ("linear1",))
    switch = AdapterSwitch(load, torch.bfloat16, torch.device("cpu"))
    switch.expect([a, b])
    for setting in ([(a, 1.0)], [(b, 1.0)], [], [(a, 0.5), (b, 0.5)]):
        switch.set(setting)
    assert len(loads) == 1


def test_an_adapter_that_does_not_fit_leaves_the_base_model():
    good = make_adapter()
    bad = Adapter({key: torch.zeros(2, 3) for key in ("nowhere.lora_A", "nowhere.lora_B")}, source="bad.pt")
    switch = AdapterSwitch(lambda: load_generator("tiny_16k"), torch.float32, torch.device("cpu"))
    switch.expect([good])
    switch.set([(good, 1.0)])
    with pytest.raises(ValueError, match=r"bad\.pt"):
        switch.set([(bad, 1.0)])
    assert all(map(torch.equal, switch.set([]).parameters(), load_generator("tiny_16k").parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_both_sides_of_an_interval_are_those_of_fresh_models(dtype):
    adapter, other = make_adapter(1, ("attn.qkv", "linear1")), make_adapter(2)

    def fresh(setting):
        return AdapterSwitch(lambda: load_generator("tiny_16k"), dtype, torch.device("cpu")).set(setting).state_dict()

    def assert_equal(state, expected):
        assert all(torch.equal(state[key], value) for key, value in expected.items())

    with_adapter, base, of_other = fresh([(adapter, 0.7)]), fresh([]), fresh([(other, 1.0)])
    switch = AdapterSwitch(lambda: load_generator("tiny_16k"), dtype, torch.device("cpu"))
    for _ in range(2):
        generator, timed = switch.set_for([(adapter, 0.7)], (0.2, 0.7))
        assert_equal(generator.state_dict(), with_adapter)
        for active, expected in ((False, base), (True, with_adapter), (False, base)):
            timed.use(active)
            assert_equal(generator.state_dict(), expected)
        timed.use(True)
        assert_equal(switch.set([(other, 1.0)]).state_dict(), of_other)  # and nothing is left of it
    assert switch.set_for([(adapter, 0.7)], WHOLE_INTERVAL)[1] is None
    assert switch.set_for([(adapter, 0.0)], (0.2, 0.7))[1] is None


def test_prompts_without_the_words_of_the_training_are_named(caplog):
    one, two, mixed = make_adapter(1), make_adapter(2), make_adapter(3)
    one.meta["prompt_prefix"], two.meta["prompt_prefix"] = ["sks", "dog:"], ["sks"]
    mixed.meta["prompt_prefix"] = ["sks", ""]
    told: set[str] = set()
    warn_of_missing_prefixes([(one, 1.0), (two, 0.0), (mixed, 1.0), (make_adapter(4), 1.0)],
                             ["a bark", "sks a bark", "dog: a bark", "a bark"], told)
    assert caplog.text.count("may hardly act") == 1 and caplog.text.count("'a bark'") == 1
    assert "prompts that begin with 'sks' or 'dog:'" in caplog.text
    caplog.clear()
    warn_of_missing_prefixes([(one, 1.0)], ["a bark"], told)
    assert not caplog.text
