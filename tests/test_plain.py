"""plumbing/ decides no number: every training script runs on plumbing/plain.py alone and logs what it logs on all of it.

The scripts are run as the one-file copies that `python -m plumbing.plain` writes: their own text, with the functions of
plain.py in the place of what they import.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, read_metrics, run_here, slow_for
from safetensors.torch import load_file
from torch.testing import assert_close

from benchmark.one_file import one_file

PAIRS = ("--num-epochs", 1, "--batch-size", 64)
STEPS = ("--total-episodes", 48, "--batch-size", 16, "--minibatch-size", 8, "--num-ppo-epochs", 2)
STEPS += ("--eval-every", 2, "--eval-rows", 9)
ROUNDS = ("--total-episodes", 48, "--prompts-per-round", 8, "--samples-per-prompt", 3, "--updates-per-round", 2)
ROUNDS += ("--batch-size", 9, "--eval-every", 2, "--eval-rows", 9)
REJECTION = (
    "--prompts-per-step",
    8,
    "--samples-per-prompt",
    6,
    "--num-steps",
    2,
    "--updates-per-step",
    2,
    "--eta",
    0.2,
)
REJECTION += ("--batch-size", 16, "--eval-every", 2, "--eval-rows", 9)
ONLINE = ("online_dpo.py", "xpo.py", "rejection_sampling.py")
SCRIPTS = ("sft.py", "reward_model.py", "dpo.py", "dpo_ln.py", "ppo.py", "drpo.py", "rto.py", *ONLINE)
ROUNDING_ALONE = {"policy/first_ratio_error"}


def flags_of(script, models):
    if script in models.rl:
        return (*models.rl[script], *STEPS)
    if script == "rejection_sampling.py":
        return (*models.flags, *REJECTION)
    if script in ONLINE:
        more = ("--alpha", 0.1, "--second-reference") if script == "xpo.py" else ()
        return (*models.flags, *ROUNDS, "--preference-dataset", models.preference, *more)
    if script == "sft.py":
        return ("--dataset", models.reference, "--base-model", ROOT / "data/tiny_pythia", *PAIRS)
    more = ("--reference-dataset", models.reference) if script == "reward_model.py" else ("--eval-every", 3)
    more += ("--response-length", 40)  # enough for every row: plain.py leaves none out
    return ("--dataset", models.preference, "--sft-path", models.sft, *PAIRS, *more)


def written(script, folder):
    """The one-file copy, in a folder that holds nothing else."""
    folder.mkdir()
    (folder / "mine.py").write_text(one_file(str(ROOT / script)))
    return folder / "mine.py"


def run_alone(path, flags):
    """A copy in a process of its own, which finds nothing but what is installed; -> stdout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, path.name, *map(str, flags)]
    done = subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def numbers_of(stdout):
    """What a copy prints: the metrics, one line an update, and the results at its end."""
    metrics = [json.loads(line) for line in stdout.splitlines() if line.startswith('{"update"')]
    return metrics, json.loads(stdout[stdout.rindex("\n{\n") :])


@pytest.mark.parametrize("script", slow_for(("dpo.py", "dpo_ln.py", "rto.py", "online_dpo.py"), SCRIPTS))
def test_plumbing_decides_no_number(script, models, tmp_path):
    flags = (*flags_of(script, models), "--output-dir", "out")
    # small micro-batches, so that plumbing has something to put together again
    run_here(script, *flags, "--run-name", "normal", "--micro-batch-size", 7, cwd=tmp_path)
    expected = read_metrics(tmp_path / "runs/normal")
    path = written(script, tmp_path / "empty")
    if script in ("drpo.py", "dpo.py"):
        stdout = run_alone(path, flags)
    else:
        stdout = run_here(path, *flags, cwd=path.parent).stdout
    found, results = numbers_of(stdout)
    assert len(found) == len(expected) > 2
    for ours, theirs in zip(found, expected):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - ROUNDING_ALONE:
            if script in ("dpo.py", "dpo_ln.py", *ONLINE) and (name, ours["update"]) == ("accuracy", 1):
                continue  # both policies are the reference: margins are 0 up to rounding, and so is their sign
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=2e-5), (ours["update"], name)
    saved = json.loads((tmp_path / "runs/normal/result.json").read_text())
    assert results.keys() == saved.keys()
    for name, row in saved.items():
        assert results[name] == pytest.approx(row, rel=1e-3, abs=2e-5)
    weights, others = (load_file(folder / "out/model.safetensors") for folder in (path.parent, tmp_path))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert_close(tensor, others[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_copy_is_a_readable_file(script, tmp_path):
    path = written(script, tmp_path / "empty")
    text, original = path.read_text(), (ROOT / script).read_text()
    assert not re.search(r"^(import|from) plumbing", text, re.MULTILINE)
    assert text.endswith(original[original.index("@dataclass\nclass Args") :])  # the script's own lines as they are
    assert text.startswith(original[: original.index("\nfrom collections")])
    shutil.copy(ROOT / "pyproject.toml", path.parent)
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=path.parent, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_the_command_writes_the_copy():
    command = [sys.executable, "-m", "plumbing.plain", "drpo.py"]
    stdout = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert stdout == one_file(str(ROOT / "drpo.py"))
    lines = len(stdout.splitlines())
    assert f"or one file of {lines} lines" in (ROOT / "README.md").read_text()
