"""The import rule: layers, no circles, nobody imports a script; and the sizes of files. Each rule is seen to fail."""

from __future__ import annotations

from pathlib import Path

import pytest
from import_rules import (
    LAYERS,
    MOST_ENTRIES,
    MOST_LINES,
    MOST_SCRIPT_LINES,
    Tree,
    command_lines,
    file_cycles,
    folder_cycles,
    imported_scripts,
    too_large,
    torchrun_variables,
    upward_imports,
)

ROOT = Path(__file__).resolve().parents[1]
RULES = (upward_imports, file_cycles, folder_cycles, imported_scripts, command_lines, torchrun_variables, too_large)


@pytest.fixture(scope="module")
def checkout() -> Tree:
    return Tree(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_checkout_keeps_the_rule(checkout, rule):
    breaches = rule(checkout)
    assert not breaches, "\n".join(["", *breaches])


def test_all_of_the_checkout_is_read(checkout):
    assert {path.parts[0] for path in checkout.files.values()} == {
        "selva", "toyworld", "comfyui", "scripts", "benchmarks", "partition_clips.py", "extract_features.py",
        "train_lora.py", "infer.py",
    }
    assert len(checkout.imports) > len(checkout.files)
    present = {path.stem for path in (ROOT / "selva").iterdir()} - {"__init__", "__pycache__", "py"}
    assert {name for names in LAYERS for name in names} == present


# -- the checker itself ------------------------------------------------------------------------------------------------


def tree_of(root: Path, files: dict[str, str]) -> Tree:
    """Return a tree of these files, path -> text."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (root / "selva").mkdir(exist_ok=True)
    return Tree(root)


GOOD = {
    "selva/flow.py": "import math\n",
    "selva/utils/torchrun.py": 'rank = "RANK"\n',
    "selva/models/blocks.py": "from selva import flow\nfrom selva.utils.torchrun import rank\n",
    "selva/cli.py": "import argparse\n",
    "selva/training/run.py": "from selva.models.blocks import flow\n",
    "toyworld/scene.py": "import selva.training.run\n",
    "train_lora.py": "import argparse\nfrom selva import cli\nfrom selva.training import run\n",
    "scripts/tool.py": "from selva.cli import ArgumentParser\nimport toyworld.scene\n",
    "benchmarks/measure.py": "import torch\n",
    "benchmarks/run.py": "from measure import Bench\nimport argparse\n",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_good_tree_passes(tmp_path, rule):
    tree = tree_of(tmp_path, GOOD)
    assert "benchmarks.measure" in {found.target for found in tree.imports}
    assert rule(tree) == []


@pytest.mark.parametrize("text, line", [
    ("import selva.training.run\n", 1),
    ("from selva.training import run\n", 1),
    ("from selva.training.run import TrainingRun\n", 1),
    ("from ..training import run\n", 1),
    ("from ..training.run import TrainingRun\n", 1),
    ("def build():\n    from selva.training.run import TrainingRun\n", 2),
    ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from selva.training.run import TrainingRun\n", 3),
    ('import importlib\nimportlib.import_module("selva.training.run")\n', 2),
])
def test_every_kind_of_import_upwards_is_found(tmp_path, text, line):
    (breach,) = upward_imports(tree_of(tmp_path, {"selva/training/run.py": "", "selva/models/blocks.py": text}))
    assert breach == (
        f"selva/models/blocks.py:{line}: selva.models.blocks imports selva.training.run, upwards from layer 1 to "
        "layer 4; imports go downwards only"
    )


def test_the_library_does_not_import_the_toy_world(tmp_path):
    files = {"selva/inference/engine.py": "import toyworld.scene", "toyworld/scene.py": ""}
    (breach,) = upward_imports(tree_of(tmp_path, files))
    assert breach.startswith("selva/inference/engine.py:1: ") and "layer 6" in breach


def test_the_library_does_not_import_the_nodes(tmp_path):
    files = {"selva/inference/engine.py": "import comfyui.nodes", "comfyui/nodes.py": "from . import host",
             "comfyui/host.py": "import selva.inference.engine"}
    (breach,) = upward_imports(tree_of(tmp_path, files))
    assert breach.startswith("selva/inference/engine.py:1: ") and "layer 6" in breach


def test_a_new_entry_needs_a_layer(tmp_path):
    (breach,) = upward_imports(tree_of(tmp_path, {"selva/misc/tools.py": ""}))
    assert breach == "selva/misc/tools.py:1: selva/misc belongs to no layer; name it in LAYERS"


def test_the_package_itself_may_name_every_layer(tmp_path):
    files = {"selva/__init__.py": "from selva.inference import engine\n", "selva/inference/engine.py": ""}
    tree = tree_of(tmp_path, files)
    assert upward_imports(tree) == [] and tree.imports[0].source == "selva"


def test_circles_of_files_are_found(tmp_path):
    tree = tree_of(tmp_path, {
        "selva/utils/a.py": "from selva.utils import b\n", "selva/utils/b.py": "\nimport selva.utils.c\n",
        "selva/utils/c.py": "from .a import x\n", "selva/utils/d.py": "from selva.utils.a import x\n",
    })
    (breach,) = file_cycles(tree)
    assert breach == (
        "selva/utils/a.py:1: selva.utils.a imports selva.utils.b; selva/utils/b.py:2: selva.utils.b imports "
        "selva.utils.c; selva/utils/c.py:1: selva.utils.c imports selva.utils.a; files import each other in a circle"
    )
    assert folder_cycles(tree) == []


def test_a_package_and_its_module_can_make_a_circle(tmp_path):
    files = {"selva/media/__init__.py": "from .audio import read\n", "selva/media/audio.py": "from . import write\n"}
    (breach,) = file_cycles(tree_of(tmp_path, files))
    assert "selva/media/__init__.py:1: selva.media imports selva.media.audio" in breach


def test_circles_of_folders_are_found(tmp_path):
    tree = tree_of(tmp_path, {
        "selva/audio/loudness.py": "import selva.weights.load\n", "selva/audio/metrics.py": "",
        "selva/weights/load.py": "", "selva/weights/layout.py": "\nimport selva.audio.metrics\n",
    })
    assert file_cycles(tree) == []
    (breach,) = folder_cycles(tree)
    assert "selva/audio/loudness.py:1: " in breach and "selva/weights/layout.py:2: " in breach
    assert breach.endswith("a circle of audio, weights in selva/")


@pytest.mark.parametrize("importer, text", [
    ("selva/utils/text.py", "import train_lora\n"),
    ("toyworld/scene.py", "from scripts import tool\n"),
    ("scripts/other.py", "import tool\n"),
    ("infer.py", "from train_lora import main\n"),
    ("benchmarks/start.py", "import train_lora\n"),
    ("scripts/more.py", "from benchmarks.measure import Bench\n"),
])
def test_nobody_imports_a_script(tmp_path, importer, text):
    files = {"train_lora.py": "", "scripts/tool.py": "", "benchmarks/measure.py": "", importer: text}
    (breach,) = imported_scripts(tree_of(tmp_path, files))
    assert breach.startswith(f"{importer}:1: ") and breach.endswith("nothing imports a script")


def test_the_library_does_not_see_the_command_line(tmp_path):
    tree = tree_of(tmp_path, {
        "selva/cli.py": "import argparse\n", "selva/inference/plan.py": "import argparse\n",
        "selva/inference/engine.py": "from selva import cli\n", "toyworld/scene.py": "from selva.cli import main\n",
    })
    assert command_lines(tree) == [
        "selva/inference/plan.py:1: selva.inference.plan imports argparse; only scripts, selva/cli.py and its "
        "settings_file.py know argparse",
        "selva/inference/engine.py:1: selva.inference.engine imports selva.cli; only scripts know selva.cli",
        "toyworld/scene.py:1: toyworld.scene imports selva.cli; only scripts know selva.cli",
    ]


def test_variables_of_torchrun_are_named_in_one_file(tmp_path):
    tree = tree_of(tmp_path, {
        "selva/utils/torchrun.py": '"RANK"\n', "selva/utils/logging.py": 'import os\nos.environ["RANK"]\n',
        "train_lora.py": '"""Here RANK is only a word."""\nprint("WORLD_SIZE")\n',
    })
    assert torchrun_variables(tree) == [
        "train_lora.py:2: names WORLD_SIZE, which only selva/utils/torchrun.py reads",
        "selva/utils/logging.py:2: names RANK, which only selva/utils/torchrun.py reads",
    ]


def test_large_files_and_crowded_packages_are_found(tmp_path):
    files = {f"selva/utils/m{i}.py": "" for i in range(2 * MOST_ENTRIES)}  # below the top there may be more
    files |= {"selva/flow.py": "\n" * MOST_LINES, "infer.py": "\n" * MOST_SCRIPT_LINES, "scripts/tool.py": "\n" * 1000}
    assert too_large(tree_of(tmp_path, files)) == []
    files |= {"selva/flow.py": "\n" * (MOST_LINES + 1), "infer.py": "\n" * (MOST_SCRIPT_LINES + 1)}
    tree = tree_of(tmp_path, files | {f"selva/m{i}.py": "" for i in range(MOST_ENTRIES)})
    (tmp_path / "selva" / "__pycache__").mkdir()
    assert too_large(tree) == [
        "infer.py: has 251 lines, expected at most 250",
        "selva/flow.py: has 451 lines, expected at most 450",
        f"selva: has {MOST_ENTRIES + 2} entries at its top, expected at most {MOST_ENTRIES}",
    ]
