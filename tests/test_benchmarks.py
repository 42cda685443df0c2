"""Every script in benchmark/ starts: small real runs in this process where there are some, its own functions otherwise."""

import contextlib
import dataclasses
import html
import importlib.util
import io
import itertools
import json
import math
import re
import subprocess
import sys
from functools import partial
from statistics import mean, pstdev
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ROOT, read_metrics, read_rows, run_here, run_script, slow_for, write_dataset
from safetensors.torch import load_file, save_file
from scipy import stats
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from data.tldr_mini.rubric import rubric_score

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


def start_rollout(cwd, folder):
    """From where the scripts start; the numbers of the first update of drpo.py are in the file that it writes itself."""
    reference = write_dataset(cwd / "data", "reference", (16, 8, 8))
    flags = ("--dataset", reference, "--sft-path", folder / "sft", "--reward-path", folder / "reward", *RL)
    flags += ("--learning-rate", 0.01, "--total-episodes", 8)
    draw = ("benchmark/rollout.py", "--policy", "", *flags)
    done = run_here(*draw, "--rows", 8, "--out", "new/drpo", "--beta", 0.7, cwd=cwd)
    assert done.stdout.splitlines()[-1] == "new/drpo.png and new/drpo.html"
    assert sorted(path.name for path in cwd.iterdir()) == ["data", "new"]
    assert sorted(path.name for path in (cwd / "new").iterdir()) == ["drpo.html", "drpo.png"]
    assert (cwd / "new/drpo.png").read_bytes().startswith(b"\x89PNG")
    run_here("drpo.py", *flags, "--beta", 0.7, "--run-name", "run", "--output-dir", "after", cwd=cwd)
    policies, metrics = [Slow(path) for path in (cwd / "after", folder / "sft")], read_metrics(cwd / "runs/run")[0]
    rollouts, log_ratios = read_page(cwd / "new/drpo.html"), []
    assert sum(x["kept"] for x in rollouts) / 8 == metrics["reset/length"] > 0
    assert sum(x["sum"]["rewards"] for x in rollouts) / 8 == pytest.approx(metrics["objective/reward"], abs=1e-3)
    for x in rollouts:
        assert {*x["kl"]} <= {None, 0.0}  # the policy is still pi_SFT
        for t in x["actions"][::3]:
            after, before = (policy.logprob(x, t, 1.0) for policy in policies)
            assert x["ratio"][t] == pytest.approx(math.exp(after - before), abs=0.006)
            log_ratios.append(abs(after - before))
    assert max(log_ratios) > 0.1
    run_here(*draw, "--policy", "runs/run", "--beta", 0, "--out", "run", cwd=cwd)  # its checkpoint
    assert max(abs(x) for x in read_page(cwd / "run.html")[0]["kl"] if x is not None) > 0.1
    run_here(*draw, "--policy", "after", "--beta", 0, "--out", "folder", cwd=cwd)
    in_run, in_folder = (read_page(cwd / name)[0] for name in ("run.html", "folder.html"))
    assert in_run["kl"] == in_folder["kl"] and in_run["values"] != in_folder["values"]  # the run has a critic too
    run_here(*draw, "--script", "ppo.py", "--out", "ppo", cwd=cwd)
    assert [x["kept"] for x in read_page(cwd / "ppo.html")] == [0] * 3


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
    """One seed of the whole chain, on a few rows, judged once; what it logged makes the tables, and nothing runs twice."""
    seeds = module("seeds.py")
    sweep = sys.modules["benchmark.sweep"]
    reference, preference = (write_dataset(cwd / task, task, (16, 8, 8)) for task in ("reference", "preference"))
    pairs = (*SMALL, "--num-epochs", 1, "--dataset", preference)
    small = {
        "sft.py": (*SMALL, "--num-epochs", 1, "--dataset", reference, "--base-model", ROOT / "data/tldr_mini/base"),
        "reward_model.py": (*pairs, "--reference-dataset", reference),
        "dpo.py": pairs,
        "ppo.py": (*RL, "--dataset", reference),
        "drpo.py": (*RL, "--dataset", reference),
        "judge.py": ("--dataset", reference, "--response-length", 8),
    }
    for script in small:
        (cwd / script).symlink_to(ROOT / script)

    def one_by_one(title, runs, workers):
        for name, command in runs.items():
            sweep.run(name, *command)

    replaced = {"ROOT": cwd, "TABLES": [("test", "1.0")], "sweep": one_by_one}
    with mock.patch.multiple(seeds, **replaced), mock.patch.object(sweep, "ROOT", cwd):
        with instead_of_processes(*small.items()):
            for _, runs in seeds.stages([1]):
                one_by_one("", runs, 1)
        with mock.patch.object(subprocess, "run", side_effect=AssertionError):
            seeds.train([1], 1, {"sft", "reward", "drpo"})
        (record,) = seeds.collect([1])
        assert list(record["test_1.0"]) == list(seeds.PAPER) and record["reward"]["all"]["pairs"] == 8
        losses = seeds.curve("sft", 1)["train"]["loss"]
        assert losses[0] > losses[-1] > 0 and "train" not in seeds.curve("reward", 1)
        curve = sweep.curves("seeds_1_ppo")
        assert curve["at"] == [0, 16] and len(curve["rubric"]) == 2
        kl = seeds.result("seeds_1_ppo")["PPO"]["kl"]
        assert sweep.last("seeds_1_ppo")[0]["kl"] == round(kl, 4) != 0
    other = json.loads(json.dumps(record))
    other["test_1.0"]["drpo"]["rubric"] += 0.5
    rows = {seeds.POLICIES[name][0]: [x["test_1.0"][name] for x in (record, other)] for name in seeds.PAPER}
    assert seeds.table(rows).count("\n") == 6 and " ± 0.0 |" in seeds.table(rows) and "win rate %" in seeds.table(rows)
    found = record["test_1.0"]["drpo"]["rubric"] - record["test_1.0"]["ppo"]["rubric"] + 0.25
    assert seeds.differences(rows).splitlines()[-1].split(" | ")[2].startswith(f"{found:+.3f} ± 3.17")


def test_interval_is_students():
    seeds = module("seeds.py")
    for count in seeds.T_975:
        draws = [math.sin(7 * i) for i in range(count)]
        middle, half = seeds.interval(draws)
        low, high = stats.ttest_1samp(draws, 0).confidence_interval()
        assert (middle, half) == pytest.approx(((low + high) / 2, (high - low) / 2), rel=1e-3)


def start_frontier(*_):
    """Read at a KL between two runs; where the lines do not reach there is no number; the last peak."""
    frontier = module("frontier.py")
    runs = [
        {"kl_coef": kl_coef, "test": {"kl": kl, "rubric": rubric}}
        for kl_coef, kl, rubric in ((0.1, 2, 1.0), (0.2, 1, 0.8), (0.01, 4, 0.0), (0, 9, 9))
    ]
    assert [frontier.at_kl(runs, kl, "rubric") for kl in (0.5, 1.5, 3, 5)] == pytest.approx([None, 0.9, 0.5, None])
    runs = [{"at": [0, 64, 128], "kl": [0, 1, 2], "rubric": list(x)} for x in ((0.1, 0.4, 0.3), (0.1, 0.2, 0.25))]
    (first, second) = frontier.losses(runs)  # the place is chosen by the other
    assert first == pytest.approx((128, 2, 0)) and second == pytest.approx((64, 1, 0.05))
    assert frontier.bootstrap([0.5, 0.5, 0.5]) == pytest.approx([0.5, 0.5])
    low, high = frontier.bootstrap([0.0, 1.0] * 50)
    assert 0.38 < low < 0.42 and 0.58 < high < 0.62
    names = [frontier.name_of(*run) for run in itertools.product(frontier.METHODS, frontier.KL_COEFS, (1, 2))]
    assert len(set(names)) == len(names) and {"seeds_1_ppo", "failures_2_0"} < set(names)
    test = {"kl": 2.0, "rubric": 0.5, "score": 0.4, "win_rate": 0.5}
    records = [
        {"method": m, "kl_coef": c, "seed": s, "at": [0, 64], "kl": [0, 2], "rubric": [0.4, 0.5 - c]}
        | {"test": test | {"kl": 1 + 30 * (0.2 - c), "rubric": 0.5 - c + 0.1 * (m == "drpo")}}
        for m, c, s in itertools.product(frontier.METHODS, frontier.KL_COEFS, (1, 2))
    ]
    with contextlib.redirect_stdout(out := io.StringIO()):
        frontier.print_tables(records)
    assert "| 2 | +0.100 ± 0.000 [+0.100, +0.100] | +0.000 ± 0.000 [+0.000, +0.000] |" in out.getvalue()
    assert "| PPO | 0.2 | 0 (0 to 0) | 0.00 (0.00 to 0.00) | -0.100 ± 0.000 |" in out.getvalue()


def start_beta(*_):
    beta = module("beta.py")
    assert [beta.name_of(b, 1) for b in beta.BETAS] == [
        "seeds_1_ppo",
        "beta_1_0.25",
        "seeds_1_drpo_0.5",
        "beta_1_0.75",
        "seeds_1_drpo",
    ]
    assert beta.against([0.5, 0.7], [0.4, 0.5]) == "+0.150 ± 0.635"


def start_true_reward(cwd, _):
    """Nothing but a right copy ties with the reference, parts of it neither; the pairs never hold equal lists."""
    true_reward = module("true_reward.py")
    (cwd / "data").symlink_to(ROOT / "data")
    with mock.patch.object(true_reward, "ROOT", cwd):
        true_reward.write_data()
    rows, pairs = (read_rows(cwd / true_reward.DATA / f"{part}/test.jsonl") for part in ("task", "pairs"))
    written = {pair["prompt"]: pair["rejected"] for pair in pairs}
    for row in rows:
        answer, quality = row["answer"], partial(rubric_score, facts=row["rubric"])
        assert row["completion"] == answer and quality(answer) == 1
        others = [
            "",
            answer[:4],
            answer[:-1],
            answer[:-2],
            answer + answer[:4],
            answer + " 5",
            written.get(row["prompt"], ""),
        ]
        assert max(map(quality, others)) < 1
    assert all(row["chosen"] != row["rejected"] for row in read_rows(cwd / true_reward.DATA / "pairs/train.jsonl"))
    scripts = {true_reward.command(task, "learned", "ppo", 1)[0] for task in ("tldr", "transcription")}
    assert scripts == {"ppo.py", "drpo.py"}


def write_run(folder, metrics, table):
    """What a sweep reads of a run."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (folder / "result.json").write_text(json.dumps(table))


def knows(command):
    """Whether a script has the flags that it is given."""
    script, *flags = command
    known = {field.name for field in dataclasses.fields(importlib.import_module(script[:-3]).Args)} | {
        "eval_rows",
        "max_rows",
    }
    used = [x[2:].removeprefix("no-").replace("-", "_") for x in flags if str(x).startswith("--")]
    return set(used) <= known and len(set(used)) == len(used)


def start_relatives(cwd, _):
    """Commands that the scripts know and that are those of the page; what was spent is what was logged; the tables."""
    relatives = module("relatives.py")
    seeds = sys.modules["benchmark.seeds"]
    every = list(itertools.product(relatives.TASKS, seeds.POLICIES, (1, 2)))
    assert all(knows(seeds.command(*run[1:])) for run in every)
    assert all(knows(relatives.command(*run[1:])) for run in every if run[1] != "sft")
    stages = seeds.stages([1, 2], list(seeds.POLICIES))
    assert [len(runs) for _, runs in stages] == [2, 6, 20, 8]  # all but ExPO, which is no run, and the reward model
    assert all(len(set(runs)) == len(runs) and all(map(knows, runs.values())) for _, runs in stages)
    assert stages[3][1]["seeds_1_judge_test_0.01"][2:16] == tuple(seeds.model_of(name, 1) for name in seeds.POLICIES)
    assert "--dpo-path models/seeds_2/dpo" in " ".join(map(str, seeds.command("rto", 2)))
    names = [relatives.name_of(*run) for run in every] + [relatives.model_of(*run) for run in every]
    assert len(set(names)) == len(names)
    for method, wanted in (
        ("drpo_0.5", "drpo.py --beta 0.5 --kl-coef 0.01 --reset-column answer"),
        ("rso", "rejection_sampling.py --num-steps 1 --prompts-per-step 639 --updates-per-step 120 --eta 0.5"),
        ("xpo", "xpo.py --beta 0.1 --alpha 0.01 --alpha-rounds 1000000"),
        ("rto", "rto.py --dpo-path models/relatives_dpo_1 --kl-coef 0.01"),
        ("dpo_ln", "dpo_ln.py --dataset runs/true_reward_data/pairs"),
        ("offline", "online_dpo.py --preference-dataset runs/true_reward_data/pairs --total-episodes 0 --beta 0.1"),
    ):
        found = " ".join(map(str, relatives.command(method, 1)))
        script, *flags = wanted.split(" --")
        assert found.startswith(script) and all(f" --{flag}" in found for flag in flags), found

    def keep(path, text):
        (cwd / "runs" / path).parent.mkdir(parents=True, exist_ok=True)
        (cwd / "runs" / path).write_text(text)

    lines = [{"time/rollout": 2, "time/tokens_per_second": 50, "time/score": 1}, {"time/optimise": 4}, {"eval/x": 1}]
    keep("seeds_1_ppo/metrics.jsonl", "\n".join(map(json.dumps, lines)))
    line = {"eta": 0.1, "accept/rate": 0.5, "accept/effective": 3, "accept/score": 0.4, "accept/control": 0.1}
    lines = [{"step": 1, "pairs/used": n} | line for n in (4, 5)] + [{"step": 2, "pairs/used": 9} | line]
    keep("seeds_1_rso/metrics.jsonl", "\n".join(map(json.dumps, [{"eval/x": 1}, *lines])))
    row = dict.fromkeys(("win_rate", "rubric", "score", "kl", "length", "eos"), 0.5)
    with mock.patch.object(relatives, "ROOT", cwd), mock.patch.object(seeds, "ROOT", cwd):
        assert relatives.spent("seeds_1_ppo") == {"tokens": 100, "seconds": 7}
        assert relatives.spent("expo") == {"tokens": None, "seconds": None}
        for task, temperature in itertools.product(relatives.TASKS, relatives.TEMPERATURES):
            rows = {relatives.model_of(task, method, 1): row for method in seeds.POLICIES}
            keep(f"{relatives.judged(task, 1, temperature)}/result.json", json.dumps(rows))
        records = [relatives.record(task, method, 1) for task in relatives.TASKS for method in seeds.POLICIES]
    found = {(x["task"], x["method"]): x["1.0"]["rubric"] for x in records}
    assert (found["tldr", "ppo"], found["transcription", "ppo"]) == (0.5, 1)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        relatives.print_tables(records)
    with contextlib.redirect_stdout(fewer := io.StringIO()):  # a JSON of before a method was there
        relatives.print_tables([x for x in records if x["method"] != "hybrid"])
    assert "hybrid" in out.getvalue() and "hybrid" not in fewer.getvalue()
    assert [step["pairs"] for x in records if x["method"] == "rso" and "steps" in x for step in x["steps"]] == [5, 9]
    with contextlib.redirect_stdout(steps := io.StringIO()):
        relatives.print_steps(records)
    assert "| RSO | 2 | 0.1 | 50.0 | 3.000 | 0.400 | 0.100 | 9.0 |" in steps.getvalue()
    assert "| PPO | 0.500 | 0.500 | 50.0 | 50.0 | 0.500 | 0.500 | 0.5 | 50.0 | 100 | 7 |" in out.getvalue()
    assert out.getvalue().count("| RTO | +0.000 ± nan | +0.000 ± nan |") == 2


def start_offline(cwd, _):
    """Every policy of the table is trained once, by flags that the script knows, and stands where the judge looks."""
    offline, seeds = module("offline.py"), sys.modules["benchmark.seeds"]
    runs = offline.runs_of(1) | offline.runs_of(2)
    assert len(runs) == 2 * 9 and all(map(knows, runs.values()))
    expo = {name: offline.expo_command(name, 1) for name in offline.ALPHAS}
    assert all(map(knows, expo.values()))
    made = {flags[flags.index("--output-dir") + 1] for name, flags in offline.runs_of(1).items()}
    made |= {seeds.model_of(name, 1) for name in ("sft", "dpo", "dpo_ln")}
    sweeps = [(flags[flags.index("--sweep-dir") + 1], offline.ALPHAS[name]) for name, flags in expo.items()]
    made |= {f"{folder}/alpha_{float(alpha)}" for folder, alphas in sweeps for alpha in alphas}
    policies = offline.policies(1)
    assert set(policies.values()) == made and len(made) == len(policies) == 24
    row = dict.fromkeys(("win_rate", "length_matched", "rubric", "kl", "length", "eos"), 0.5)
    with mock.patch.object(seeds, "ROOT", cwd):
        for temperature in offline.TEMPERATURES:
            (path := cwd / f"runs/{offline.judged(1, temperature)}/result.json").parent.mkdir(parents=True)
            path.write_text(json.dumps(dict.fromkeys(policies.values(), row)))
        for name in offline.runs_of(1) | dict.fromkeys(("seeds_1_dpo", "seeds_1_dpo_ln")):
            (path := cwd / f"runs/{name}/metrics.jsonl").parent.mkdir(parents=True)
            path.write_text(json.dumps({"epoch": 1, "eval/accuracy": 0.75}) + "\n")
        with mock.patch.object(sys.modules["benchmark.sweep"], "ROOT", cwd):
            found = list(offline.records(1))
    assert [run["accuracy"] for run in found if run["method"] in offline.BETAS] == [0.75] * 10
    assert offline.table({(run["method"], run["value"]): [run] for run in found}).count("50.0 | 50.0 | 0.500") == 24


def start_coverage(cwd, _):
    """Every run once, with flags that its script knows; what is recorded of one; the tables and the figure."""
    coverage, plot = module("coverage.py"), module("plot.py")
    runs = [*coverage.coverage_runs((1, 2)), *coverage.sweep_runs((1, 2))]
    assert len({name for name, *_ in runs}) == len(runs) == 2 * (12 + 2 + 12 + 21)
    assert all(knows(command) for *_, command in runs)
    commands = {name: " ".join(map(str, command)) for name, _, command in runs}
    assert "--beta 0.1 --alpha 0.01 --alpha-rounds 1000000" in commands["coverage_8_0.3_xpo_1"]
    assert "--alpha" not in commands["xpo_lists_2.0_paper_1"] and "--beta 2.0" in commands["xpo_lists_2.0_paper_1"]
    assert "--alpha 0.01 --alpha-rounds 3 --total" in commands["xpo_lists_0.1_0.01_3_1"]
    algorithm_1 = commands["coverage_6_0.3_xpo_reference_1"]
    assert (
        algorithm_1.startswith("xpo.py") and "--samples-per-prompt 2" in algorithm_1 and "--second-ref" in algorithm_1
    )
    write_run(
        cwd / "runs/some",
        [{"update": 0, "eval/score": -0.5, "eval/eos": 0.5, "eval/kl": 0.0, "eval/length": 9.0}]
        + [{"update": 1, "pairs": 1}]
        + [
            {
                "update": 2,
                "episodes": 64,
                "pairs": 3,
                "eval/score": 0.25,
                "eval/eos": 1.0,
                "eval/kl": 2.0,
                "eval/length": 8.0,
            }
        ],
        {"SFT": {"kl": 0.0}, "XPO": {"kl": 2.5}},
    )
    with mock.patch.object(sys.modules["benchmark.sweep"], "ROOT", cwd):
        found = coverage.record("some", dict(runs[0][1]))
    assert found == runs[0][1] | {"at": [0, 64], "success": [0.0, 0.25], "kl": [0.0, 2.0]} | {
        "tokens": [9.0, 8.0],
        "pairs": [0, 3],
        "test": {"kl": 2.5},
    }
    records = []
    for _, what, _ in runs:
        end = 0.5 if what["seed"] == 1 else 0.25
        run = {"at": [0, 1024, 10240], "success": [0, end / 2, end], "test": {"win_rate": end, "kl": 2.0}}
        records.append(what | run)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        coverage.print_tables(records)
    assert (
        "| 8, 0.3^8 = 7e-05 | 0.38 (0.25 to 0.50) | 0.38 (0.25 to 0.50) | 0.38 (0.25 to 0.50) |  |  |" in out.getvalue()
    )
    assert out.getvalue().count("| 0.5 | 37.5 (25.0 to 50.0), 2.0 |") == 2
    figure = pytest.importorskip("matplotlib.figure").Figure()
    with mock.patch.object(plot, "load", lambda _: records):
        plot.draw_coverage(figure)
    assert [list(line.get_ydata()) for line in figure.axes[3].lines] == [[0, 0.1875, 0.375]] * 3


def start_usage(cwd, _):
    """Commands that the scripts know and that stand in the docs; the number of each is the one of its last table."""
    usage, sweep = module("usage.py"), sys.modules["benchmark.sweep"]
    docs = " ".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    for name, (script, flags, key) in usage.COMMANDS.items():
        command = usage.command(name, 2)
        assert knows(command) and {"--seed", 2} <= set(command), name
        shown = " ".join(map(str, (script, *flags)))
        assert f"python {shown} " in docs, shown
        table = (
            {"SFT": {key: 0.1}, "policy": {key: 0.2}} if key != "accuracy" else {"all": {key: 0.2}, "few": {key: 0.1}}
        )
        write_run(cwd / f"runs/usage_2_{name}", [], table)
        with mock.patch.object(sweep, "ROOT", cwd):
            assert usage.record(name, 2) == {"command": name, "seed": 2, key: 0.2}
    assert "--sft-path" not in usage.command("sft_responses", 2)
    assert [x for x in usage.command("question_mark", 2) if str(x).endswith("reward")] == []


def start_failures(*_):
    failures = module("failures.py")
    scripts = [failures.command(name, 1)[0] for name in failures.FAILURES]
    assert scripts == ["ppo.py"] * 4 + ["drpo.py"] * 2 + ["ppo.py"] * 2
    assert "models/failures_1_chance" in failures.command("reward model at chance", 1)


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


def start_sweep(cwd, _):
    """Each run once; what was stopped goes on by its name; the first that fails ends the program and says why."""
    sweep = module("sweep.py")
    (cwd / "fake.py").write_text(FAKE)
    with mock.patch.object(sweep, "ROOT", cwd):
        runs = {"a": ["fake.py", "--x", 1], "b": ["fake.py"]}
        (cwd / "runs/b").mkdir(parents=True)
        (cwd / "runs/b/args.json").touch()
        for _ in range(2):
            sweep.sweep("title", runs, workers=2)
        assert sorted((cwd / "calls").read_text().splitlines()) == ["--resume b", "--x 1 --run-name a"]
        assert sweep.curves("a") == {"at": [0, 8], "x": [1, 2]}
        with pytest.raises(
            SystemExit, match="runs/a was made by another fake.py, or with other flags: remove runs/a to"
        ):
            sweep.sweep("title", {"a": ["fake.py", "--x", 2]}, workers=1)
        (cwd / "fake.py").write_text(FAKE + "# another text")
        with pytest.raises(SystemExit, match="or a.key if the change decides no number"):
            sweep.sweep("title", {"a": ["fake.py", "--x", 1]}, workers=1)
        records = [{"seed": 1, "x": 0}, {"seed": 2, "x": 0}]
        sweep.write(cwd / "out.json", records, "seed")
        sweep.write(cwd / "out.json", [{"seed": 1, "x": 5}], "seed")  # of one seed: the other stays
        assert json.loads((cwd / "out.json").read_text()) == [{"seed": 1, "x": 5}, records[1]]
        with pytest.raises(SystemExit, match="what went wrong"):
            sweep.sweep("title", {"c": ["fake.py", "fail"]}, workers=1)


def start_separation(cwd, _):
    """One small run of its command, from a random policy; what it logged is what the tables are made of."""
    separation, base = module("separation.py"), ROOT / "data/transcription/base"
    torch.manual_seed(1)
    run = {"length": 2, "seed": 1, "beta": 0.5, "kl_coef": 0.01, "episodes": 5120}
    name, data, sft = separation.name_of(run), cwd / separation.data_of(run), cwd / "models" / separation.sft_of(run)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(sft)
    AutoTokenizer.from_pretrained(base).save_pretrained(sft)
    names = [separation.name_of(setting) for seed in (1, 2) for setting in separation.settings(seed)]
    assert len(names) == len(set(names))
    (cwd / "data").symlink_to(ROOT / "data")
    run_here("data/transcription/generate.py", "--length", 2, "--rows", 16, "--out", data, cwd=cwd)
    script, *flags = separation.rl_command(run)
    run_here(script, *flags, *RL, "--eval-every", 1, "--response-length", 8, "--run-name", name, cwd=cwd)
    metrics = read_metrics(cwd / "runs" / name, start=0)
    with mock.patch.object(separation.sys.modules["benchmark.sweep"], "ROOT", cwd):
        (found,) = separation.write_runs(cwd / "out.json", [run])
        assert separation.write_runs(cwd / "out.json", []) == []
    assert [found] == json.loads((cwd / "out.json").read_text()) and found["at"] == [0, 8, 16]
    assert found["success"] == [round(x["eval/score"] + 1 - x["eval/eos"], 3) for x in metrics] == [0] * 3
    runs = [run | {"at": [0, 8, 16], "success": success} for success in ([0, 0.5, 0.9], [0, 0.2, 0.5], [0, 0.1, 0.3])]
    assert separation.cell_of(runs, length=2) == "12 (8 to 16), 1 of 3 never; 0.57"
    assert separation.cell_of(runs, length=4) == ""
    factor, law = separation.growth({4: [1000], 6: [4000], 7: [1, None], 8: [16000]}, logarithmic=True)
    assert (factor, law(10)) == pytest.approx((4, 64000))
    more, law = separation.growth({4: [1000, 3000], 8: [3000], 10: []})
    assert (more, law(12)) == pytest.approx((500, 4000))
    assert separation.growth({4: [1000], 6: [None]}) is None


def start_reset_rules(cwd, folder):
    """Each rule in a real run on posts, whose answers differ in length."""
    found, data = module("reset_rules.py"), write_dataset(cwd / "data", "reference", (16, 8, 8))
    for rule in found.RULES:
        flags = ("--dataset", data, "--sft-path", folder / "sft", "--reward-path", folder / "reward", *RL)
        script = found.write_script(cwd, rule)
        run_here(script, *flags, "--run-name", rule, "--output-dir", f"models/{rule}", cwd=cwd)
    uniform, *others = (read_metrics(cwd / "runs" / rule) for rule in found.RULES)
    assert all(other[0]["reset/length"] != uniform[0]["reset/length"] for other in others)


def start_deviations(cwd, folder):
    """Ours are the runs of other sweeps; judged again at a run's own temperature, its policy is what the run found it to be."""
    found, seeds, separation = module("deviations.py"), module("seeds.py"), module("separation.py")
    keys = [(task, name, seed) for task in found.TASKS for name in (found.OURS, *found.DEVIATIONS) for seed in (1, 2)]
    runs = {found.run_of(*key): tuple(found.command(*key, "drpo.py")) for key in keys}
    assert len(runs) == len({command[-1] for command in runs.values()}) == len(keys)  # the last is the model's folder
    known = [seeds.stages([seed])[2][1][f"seeds_{seed}_drpo"] for seed in (1, 2)]
    known += [separation.rl_command(x) for x in separation.settings(1) if (x["length"], x["beta"]) == (8, 1)][:1]
    assert {*map(tuple, known)} <= {*runs.values()}

    data, cold = write_dataset(cwd / "data", "reference", (16, 8, 8)), found.COLD
    flags = ("--dataset", data, "--sft-path", folder / "sft", "--reward-path", folder / "reward", *RL)
    run_here("drpo.py", *flags, "--temperature", cold, "--run-name", "a", "--output-dir", cwd / "out", cwd=cwd)
    with mock.patch.object(found, "ROOT", cwd):
        again = found.cold("a")
    assert again == pytest.approx(json.loads((cwd / "runs/a/result.json").read_text())["DR-PO"], abs=1e-4)

    lists = {"score": [0.5, -0.25], "eos": [1, 0.75]}
    assert found.with_success("transcription", lists) == lists | {"success": [0.5, 0]}
    assert found.with_success("tldr_mini", lists) == lists
    task, records = "transcription", []
    for number, (name, seed) in enumerate((name, seed) for name in (found.OURS, *found.DEVIATIONS) for seed in (1, 2)):
        test = {"success": 0.5 + 0.01 * number**2, "kl": 2.0, "length": 17.0}
        curves = {"at": [0, 320], "success": [0, 0.6]}
        records.append({"task": task, "deviation": name, "seed": seed, "test": test, "cold": test} | curves)
    lines = found.table(task, records).splitlines()
    assert lines[2].startswith("| ours, itself | 0.505 | 0.505 | 2.00 | 17.0 | 320 (320 to 320); 0.60 |")
    assert lines[3].startswith("| value_loss | +0.060 ± 0.254 |")  # +0.04 and +0.08
    other = {"task": "tldr_mini", "test": dict.fromkeys(("rubric", "win_rate", "kl", "length"), 0.5)}
    other = [{key: run[key] for key in ("deviation", "seed")} | other | {"cold": other["test"]} for run in records]
    assert (
        found.table("tldr_mini", other).splitlines()[-1]
        == "| all" + " | +0.000 ± 0.000" * 4 + " | +0.00 ± 0.00 | +0.0 ± 0.0 |"
    )


def start_plot(cwd, _):
    names = module("plot.py").drawable()
    run_here("benchmark/plot.py", "--out", cwd, cwd=cwd)
    assert sorted(path.name for path in cwd.iterdir()) == sorted(
        f"{name}.{x}" for name in names for x in ("png", "svg")
    )
    for path in cwd.glob("*.svg"):  # the committed figures are those of the committed numbers
        assert path.read_bytes() == (ROOT / "docs" / path.name).read_bytes()


def start_one_file(*_):
    assert "def load_rows" in module("one_file.py").one_file(str(ROOT / "sft.py"))


def start_speed_trl(cwd, _):
    pytest.importorskip("trl", reason="compares with TRL, whose last release with a PPOTrainer is 1.12.0")
    module("speed.py").make(cwd, layers=1, vocab=64, width=8, rows=8)
    flags = ("--batch", 2, "--updates", 2, "--micro-batch", 2)
    done = run_script("benchmark/speed_trl.py", "dpo", cwd, *flags, cwd=cwd)
    assert len(json.loads(done.stdout.splitlines()[-1])) == 2


FAKE = r"""
import json, os, sys
if "fail" in sys.argv:
    sys.exit("what went wrong")
flag, name = sys.argv[-2:]
with open("calls", "a") as file:
    print(*sys.argv[1:], file=file)
os.makedirs(f"runs/{name}", exist_ok=True)
for file, text in (("result.json", "{}"), ("metrics.jsonl", '{"episodes": 0, "eval/x": 1}\n{"a": 1}\n{"episodes": 8, "eval/x": 2}')):
    with open(f"runs/{name}/{file}", "w") as out:
        out.write(text)
"""


class Slow:
    """A model read without padding, cache or batch, one forward pass a number, in float64."""

    def __init__(self, path, kind=AutoModelForCausalLM):
        self.model, self.tokenizer = (
            kind.from_pretrained(path, dtype=torch.float64),
            AutoTokenizer.from_pretrained(path),
        )

    @torch.no_grad()
    def state(self, rollout, t):
        """Hidden state (d,) after the prompt and t tokens of the response."""
        ids = self.tokenizer(rollout["prompt"])["input_ids"] + rollout["ids"][:t]
        return self.model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]

    def logprob(self, rollout, t, temperature):
        logits = self.model.get_output_embeddings()(self.state(rollout, t)) / temperature
        return logits.log_softmax(-1)[rollout["ids"][t]].item()

    def value(self, rollout, t):
        return self.model.score(self.state(rollout, t)).item() - self.model.config.score_mean


def read_page(path):
    """The rollouts on a page of benchmark/rollout.py: prompt, tokens, rows of numbers (None where there is none), sums."""
    found = []
    for part in path.read_text(encoding="utf-8").split("<h2>")[1:]:
        prompt, kept = re.search("<pre>(.*?)</pre>", part, re.DOTALL)[1], re.search(r"reset: (\d+) of", part)
        x = {"prompt": html.unescape(prompt), "kept": int(kept[1]) if kept else 0, "sum": {}, "ids": []}
        for name, row in re.findall(r"<tr class=(\w+)>(.*?)</tr>", part.replace("−", "-"), re.DOTALL):
            x["ids"] += [int(id) for id in re.findall('title="id ([0-9]+)"', row)]
            cells = re.findall("<td class=(?!sum)[^>]*>([^<]*)<", row)
            x.setdefault(name, []).extend(float(cell) if cell else None for cell in cells)
            x["sum"] |= [(name, float(number)) for number in re.findall("Σ ([^<]*)<", row)]
        x["actions"] = [t for t, mask in enumerate(x["mask"]) if mask == 1]
        found.append(x)
    return found


@pytest.mark.slow
def test_rollout_draws_what_slow_loops_find(tmp_path):
    """All 8 rollouts of a batch, so that the whitening can be done again too; the prompts and answers hold HTML."""
    tiny, kinds = ROOT / "data/tiny_pythia", {"reward": AutoModelForSequenceClassification}
    for seed, name in enumerate(("sft", "policy", "reward")):
        torch.manual_seed(seed)
        model = kinds.get(name, AutoModelForCausalLM).from_config(AutoConfig.from_pretrained(tiny, num_labels=1))
        model.config.score_mean = 0.3
        if name != "reward":  # random models seldom end; here the logit of the EOS, which has id 0, is 4.2 more
            with torch.no_grad():
                model.base_model.final_layer_norm.bias.fill_(1.0)
                model.get_output_embeddings().weight[0] += 4.2 / model.config.hidden_size
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / name)

    def with_html(rows):
        return [
            row | {"prompt": f"<script>{n}</script> {row['prompt']}", "completion": f" <i>&{row['completion']}"}
            for n, row in enumerate(rows)
        ]

    data = write_dataset(tmp_path / "data", "reference", (16, 8, 8), with_html)
    flags = ("--policy", "policy", "--sft-path", "sft", "--reward-path", "reward", "--dataset", data, *RL, "--rows", 8)
    flags += (
        "--gamma",
        0.9,
        "--gae-lambda",
        0.8,
        "--kl-coef",
        0.3,
        "--temperature",
        0.8,
        "--missing-eos-score",
        -1.5,
        "--seed",
        2,
    )
    run_here("benchmark/rollout.py", *flags, cwd=tmp_path)
    text, rollouts = (tmp_path / "rollout.html").read_text(encoding="utf-8"), read_page(tmp_path / "rollout.html")
    assert "<script" not in text and "<i>" not in text and text.count("&lt;script&gt;") == 8

    policy, sft, reward = (
        Slow(tmp_path / name, kinds.get(name, AutoModelForCausalLM)) for name in ("policy", "sft", "reward")
    )
    completions = {row["prompt"]: row["completion"] for row in read_rows(data / "train.jsonl")}
    ends, everything = [], []
    for x in rollouts:
        kept, real = x["kept"], x["ids"].index(0) + 1 if 0 in x["ids"] else 32
        assert x["ids"][:kept] == policy.tokenizer(completions[x["prompt"]])["input_ids"][:kept]
        assert x["actions"] == list(range(kept, real)) and x["sum"]["mask"] == real - kept
        score = reward.value(x, real) if 0 in x["ids"] else -1.5
        x["slow"] = slow = {name: {} for name in ("kl", "penalty", "score", "rewards", "values", "advantages")}
        for t in x["actions"]:
            slow["kl"][t] = policy.logprob(x, t, 0.8) - sft.logprob(x, t, 0.8)
            slow["penalty"][t], slow["values"][t] = -0.3 * slow["kl"][t], reward.value(x, t)
            slow["rewards"][t] = slow["penalty"][t] + (score if t == real - 1 else 0)
        slow["score"][real - 1] = score  # nowhere else
        for t in x["actions"]:
            after = [*range(t, real)]
            errors = [slow["rewards"][u] + 0.9 * slow["values"].get(u + 1, 0) - slow["values"][u] for u in after]
            slow["advantages"][t] = sum((0.9 * 0.8) ** n * error for n, error in enumerate(errors))
        everything += slow["advantages"].values()
        ends.append((kept > 0, 0 in x["ids"]))
        assert x["sum"]["score"] == pytest.approx(score, abs=6e-4)
        assert x["sum"]["rewards"] == pytest.approx(score - 0.3 * sum(slow["kl"].values()), abs=6e-4)
    assert ends[0][0] and not ends[1][0] and len({*ends}) == 4  # a reset, then a bare prompt; each of them ended or not
    middle, spread = mean(everything), pstdev(everything)
    for x in rollouts:
        x["slow"]["whitened"] = {t: (a - middle) / spread for t, a in x["slow"]["advantages"].items()}
        for name, numbers in x["slow"].items():
            assert [t for t, number in enumerate(x[name]) if number is not None] == [*numbers]  # masked: nothing
            digits = 3 if name in ("penalty", "score", "rewards") else 2
            for t, number in numbers.items():
                assert x[name][t] == pytest.approx(number, abs=0.5 * 10**-digits + 1e-4), (name, t)


def test_rollout_shows_any_text_as_text():
    rollout, bad = module("rollout.py"), "<script>$x</script>"
    cells = {name: ("", "#ffffff", "plain") for name in rollout.LINES}
    column = SimpleNamespace(kind="own", text=bad, id=1, width=1.0, cells=cells)
    sums = dict.fromkeys(rollout.SUMMED, "0")
    drawn = SimpleNamespace(title=bad, outcome=bad, prompt=bad, sums=sums, columns=[column])
    page = rollout.page(bad, [bad], [drawn], dict.fromkeys(rollout.LINES, bad))
    assert "<script" not in page and page.count("&lt;script&gt;") == 8 + len(rollout.LINES)


def test_rollout_chooses_one_of_each_kind():
    choose = module("rollout.py").choose
    reset, ended = [False, False, True, True, False], [False, True, False, True, True]
    assert choose(reset, ended, 3) == [3, 1, 0]
    assert choose(reset, ended, 9) == [3, 1, 0, 2, 4]
    assert choose([False] * 2, [True] * 2, 3) == [0, 1]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--rows", 0), "--rows must be at least 1, and --out must end with the name of a file"),
        (("--script", "dpo.py"), "dpo.py has no rollouts"),
        (("--script", "none.py"), "No such file"),
        (("--beta", 2), "--beta 2.0 is a probability"),
        (("--policy", "run"), "--policy run: cannot read checkpoint_1_0.pt"),
    ],
)
def test_rollout_says_what_is_wrong(flags, message, tmp_path, random_models):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint_1_0.pt").write_text("no checkpoint")
    data = write_dataset(tmp_path / "data", "reference")
    models = ("--sft-path", random_models / "sft", "--reward-path", random_models / "reward", "--dataset", data)
    done = run_here("benchmark/rollout.py", "--policy", "", *models, *RL, *flags, cwd=tmp_path, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and message in errors[0]


def test_rollout_needs_matplotlib(tmp_path):
    with mock.patch.dict(sys.modules, {"matplotlib": None}):
        done = run_here("benchmark/rollout.py", cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (2, "error: the picture needs matplotlib: pip install matplotlib\n")


@pytest.mark.parametrize("name", slow_for(("rollout.py", "processes.py", "speed.py"), SCRIPTS))
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
    identical = [line for line in done.stdout.splitlines() if line.count("IDENTICAL") == 2]
    assert len([line for line in identical if line.startswith("new: ")]) == 2 and "other" not in done.stdout
