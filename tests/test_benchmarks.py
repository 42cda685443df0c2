"""Every script in benchmark/ starts: small real runs in this process where there are some, its own functions otherwise."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ROOT, run_here, run_script, write_dataset
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

SCRIPTS = sorted(path.name for path in (ROOT / "benchmark").glob("*.py"))
SMALL = ("--batch-size", 8, "--micro-batch-size", 8)
RL = (*SMALL, "--minibatch-size", 8, "--total-episodes", 16, "--num-ppo-epochs", 1, "--eval-rows", 4)


def module(name):
    """A benchmark's functions, without its main part."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name.removesuffix('.py')}", ROOT / "benchmark" / name)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def instead_of_processes(*flags_of, cwd=None):
    """What subprocess.run does, within this process; flags_of: pairs of a script's name and the flags it gets on top."""

    launch = subprocess.run

    def run(command, cwd=cwd, **options):
        if command[0] == "git":  # for the model card
            return launch(command, cwd=cwd, **options)
        assert command[0] == sys.executable
        script = command[1].rpartition("/")[2]
        return run_here(script, *command[2:], *dict(flags_of).get(script, ()), cwd=cwd, check=False)

    return mock.patch.object(subprocess, "run", run)


@pytest.fixture(scope="module")
def random_models(tmp_path_factory):
    """Folder with sft/ and reward/, of random weights and the embedded task's vocabulary."""
    folder, tiny = tmp_path_factory.mktemp("random"), ROOT / "data/tiny_pythia"
    config = AutoConfig.from_pretrained(tiny, num_labels=1)
    torch.manual_seed(1)
    for name, auto_class in (("sft", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        auto_class.from_config(config).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tiny).save_pretrained(folder / name)
    return folder


# one start for every script
def start_dry_run(cwd, _):
    done = run_here("benchmark/dry_run.py", "sft.py", "--base-model", ROOT / "data/tiny_pythia", cwd=cwd)
    assert "dry run of sft.py: it would start now" in done.stdout and not list(cwd.iterdir())


def start_memory(cwd, _):
    assert "--variants" in run_here("benchmark/memory.py", "--help", cwd=cwd).stdout
    memory = module("memory.py")
    memory.write_naive(cwd)  # a copy of ppo.py in which one function is another
    assert memory.NAIVE in (cwd / "ppo.py").read_text()
    compile((cwd / "ppo.py").read_text(), "ppo.py", "exec")


def start_processes(cwd, folder):
    models = ("--sft-path", folder / "sft", "--reward-path", folder / "reward")
    with instead_of_processes(("drpo.py", ("--num-ppo-epochs", 1))):
        flags = ("--processes", 1, "--rounds", 1, "--updates", 2)
        done = run_here("benchmark/processes.py", *flags, *models, cwd=cwd)
    assert "| 2 | grad_norm |" in done.stdout and done.stdout.rstrip().endswith("| 1.00 (1.00 to 1.00) |")


def start_pythia_1b_gpu(cwd, _):
    done = run_here("benchmark/pythia_1b_gpu.py", "--tiny", cwd=cwd)
    assert done.stdout.count("\nok: ") == 3 and "| 3 | " in done.stdout
    assert not list(cwd.iterdir())


def start_reward_ranking(_, folder):
    found = module("reward_ranking.py").ranking(folder / "sft", folder / "reward", num_samples=2, num_rows=16)
    assert list(found) == ["overall", "within", "all samples", "best of 8"]
    assert all(-1 <= number <= 1 for number in found.values())


def start_same_numbers(cwd, folder):
    """The comparison itself, on runs written here; the real ones take minutes."""
    same_numbers = module("same_numbers.py")
    lines = [{"update": 1, "loss": 0.5, "time/update": 1.0}, {"update": 2, "loss": 0.25, "eval/kl": 1.0}]
    weights = load_file(folder / "sft/model.safetensors")
    name = next(iter(weights))

    def write(run, lines, weights):
        (cwd / run).mkdir()
        save_file(weights, cwd / run / "model.safetensors")
        (cwd / "runs" / run).mkdir(parents=True)
        (cwd / "runs" / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return cwd / run

    first = write("first", lines, weights)
    again = write("again", [lines[0] | {"time/update": 2.0, "reset/length": 3.0}, lines[1]], weights)
    other = write("other", [lines[0], lines[1] | {"eval/kl": 0.5}], weights | {name: weights[name] * 2})
    short = write("short", lines[:1], {name: weights[name]})
    assert same_numbers.compare(first, again, ["reset/length"]) == (2, 5, "IDENTICAL", "IDENTICAL")
    assert same_numbers.compare(first, again)[2:] == ("other keys or updates", "IDENTICAL")
    assert same_numbers.compare(first, other)[2:] == ("5.0e-01 in eval/kl", f"1.0e+00 in {name}")
    assert same_numbers.compare(first, short)[2:] == ("other keys or updates", "other tensors")
    same_numbers.write_inputs(cwd)
    assert (cwd / "reference/train.jsonl").read_text().count("\n") == same_numbers.ROWS["train"]


def start_seeds(cwd, _):
    """One seed of the whole chain, on a few rows, judged once; then its tables again, and nothing runs twice."""
    seeds = module("seeds.py")
    reference, preference = (write_dataset(cwd / task, task, (16, 8, 8)) for task in ("reference", "preference"))
    pairs = (*SMALL, "--num-epochs", 1, "--dataset", preference)
    small = {
        "sft.py": (*SMALL, "--num-epochs", 1, "--dataset", reference, "--base-model", ROOT / "data/tiny_pythia"),
        "reward_model.py": (*pairs, "--reference-dataset", reference),
        "dpo.py": pairs,
        "ppo.py": (*RL, "--dataset", reference),
        "drpo.py": (*RL, "--dataset", reference),
        "judge.py": ("--dataset", reference, "--response-length", 8),
    }
    with mock.patch.multiple(seeds, ROOT=cwd, TABLES=[("test", "1.0")]), instead_of_processes(*small.items()):
        seeds.run_seed(1)
        result = seeds.load(1, "judge_test_1.0")
        assert [f"models/seeds_1/{name}" in result for name in seeds.POLICIES] == [True] * 4
        table = seeds.table({name: [result[f"models/seeds_1/{name}"]] * 2 for name in seeds.POLICIES})
        assert table.count("\n") == 5 and " ± 0.0 |" in table and "win rate %" in table
        assert seeds.load(1, "reward")["all"]["pairs"] == 8
        with mock.patch.object(subprocess, "run", side_effect=AssertionError):
            seeds.run_seed(1)


def start_speed(cwd, _):
    """Both sides of --against are this tree; the models are as small as they can be."""
    speed = module("speed.py")
    speed.SIZES["tiny"] = {"layers": 1, "vocab": 64, "width": 8, "rows": 32}

    def measure(command, cwd, code=0, **_):
        done = run_here(command[1], *command[2:], *(small if code == 0 else ()), cwd=cwd, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout, 1.0

    small = ("--total-episodes", 16, *SMALL, "--minibatch-size", 8, "--num-ppo-epochs", 1)
    args = SimpleNamespace(sizes=["tiny"], jobs=["drpo"], rounds=1, updates=1, micro_batch=8, stop=False)
    args.against, args.trl_python = ROOT, ""
    out = []
    replaced = {"measure": measure, "make_apart": speed.make, "print_table": lambda titles, rows: out.append(rows)}
    with mock.patch.multiple(speed, **replaced):
        speed.compare(args, cwd)
    (row,), starts = out
    assert row[:3] == ["tiny", "drpo.py", ROOT.name] and row[6:] == ["1.00 (1.00 to 1.00)"] * 3
    assert [start[0] for start in starts] == ["ppo.py --help", "first error"]
    assert set(speed.rollout_parts(cwd / "tiny", 64, rows=4)) > {"layers", "output head"}
    assert speed.pass_parts(cwd / "tiny", 64, passes=1)["matrix products"] > 0


def start_one_file(*_):
    assert "def load_rows" in module("one_file.py").one_file(str(ROOT / "sft.py"))


def start_speed_trl(cwd, _):
    pytest.importorskip("trl", reason="compares with TRL, whose last release with a PPOTrainer is 1.12.0")
    module("speed.py").make(cwd, layers=1, vocab=64, width=8, rows=8)
    flags = ("--batch", 2, "--updates", 2, "--micro-batch", 2)
    done = run_script("benchmark/speed_trl.py", "dpo", cwd, *flags, cwd=cwd)
    assert len(json.loads(done.stdout.splitlines()[-1])) == 2


@pytest.mark.parametrize("name", SCRIPTS)
def test_starts(name, tmp_path, random_models):
    start = globals().get(f"start_{name.removesuffix('.py')}")
    assert start, f"benchmark/{name} needs a start_{name.removesuffix('.py')} here"
    start(tmp_path, random_models)


@pytest.mark.slow
def test_same_numbers(tmp_path):
    earlier = subprocess.run(["git", "cat-file", "-e", "7194241"], cwd=ROOT, capture_output=True)
    if earlier.returncode != 0:
        pytest.skip("commit 7194241 is not in this copy of the repository")
    done = run_script("benchmark/same_numbers.py", cwd=tmp_path)
    assert done.stdout.count("IDENTICAL") == 18
