"""Stopped, killed, broken and full: a run goes on from its last whole checkpoint as if nothing had happened."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_metrics, read_rows, run_script, write_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

SCRIPTS = ("sft.py", "reward_model.py", "dpo.py", "ppo.py", "drpo.py")


@pytest.fixture(scope="module")
def chain(models):
    """Flags of a run of seven or eight updates for every script, and the runs that nothing disturbs, made when asked for."""
    pairs = ("--dataset", models.preference, "--sft-path", models.sft, "--num-epochs", 1, "--batch-size", 32)
    steps = ("--total-episodes", 112, "--batch-size", 16, "--minibatch-size", 16, "--eval-every", 3, "--eval-rows", 8)
    flags = {
        "sft.py": ("--dataset", models.reference, "--base-model", ROOT / "data/tiny_pythia", "--num-epochs", 1),
        "reward_model.py": (*pairs, "--reference-dataset", models.reference),
        "dpo.py": (*pairs, "--eval-every", 3),
        "ppo.py": (*models.flags, *steps),
        "drpo.py": (*models.flags, *steps),
    }
    flags["sft.py"] += ("--batch-size", 32)
    undisturbed = {}

    def whole(script, *more):
        key = (script, *more)
        if key not in undisturbed:
            undisturbed[key] = run(script, f"whole_{script[:-3]}{len(more) or ''}", *more)
        return undisturbed[key]

    def named(script, name, *more):
        return (*flags[script], "--save-every", 2, "--run-name", name, "--output-dir", f"out_{name}", *more)

    def run(script, name, *more):
        run_script(script, *named(script, name, *more), cwd=models.folder)
        return result(name)

    def result(name):
        weights = read_weights(models.folder / f"out_{name}")
        return SimpleNamespace(metrics=read_metrics(models.folder / "runs" / name), weights=weights)

    return SimpleNamespace(folder=models.folder, named=named, whole=whole, result=result, models=models)


def read_weights(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def start(script, flags, cwd):
    """A script in the background, in a session of its own."""
    command = [sys.executable, str(ROOT / script), *(str(flag) for flag in flags)]
    return subprocess.Popen(command, cwd=cwd, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_updates(process, run_dir, count):
    """Until metrics.jsonl has `count` whole lines."""
    path = run_dir / "metrics.jsonl"
    while not (path.parent.exists() and (count == 0 or path.exists() and path.read_text().count("\n") >= count)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def lines_up_to_checkpoint(run_dir):
    """What a resumed run must keep of metrics.jsonl, byte for byte: an update computed again has other times."""
    updates = [int(path.name[11:19]) for path in run_dir.glob("checkpoint_*.pt")]
    return "".join((run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)[: max(updates, default=0)])


def assert_same(found, expected):
    assert found.metrics == expected.metrics
    assert expected.weights and found.weights == expected.weights


@pytest.mark.parametrize("script", SCRIPTS)
def test_stopped_and_resumed_equals_undisturbed(chain, script):
    name = f"stopped_{script[:-3]}"
    process = start(script, chain.named(script, name, "--save-every", 1000), chain.folder)
    wait_for_updates(process, chain.folder / "runs" / name, 3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 1 and f"to go on: --resume {name}" in errors and "Traceback" not in errors
    run_dir = chain.folder / "runs" / name
    stopped_at, kept = len(read_metrics(run_dir)), lines_up_to_checkpoint(run_dir)
    assert 3 <= stopped_at < 7 and not (chain.folder / f"out_{name}").exists()
    assert kept == (run_dir / "metrics.jsonl").read_text()  # there is a checkpoint of the last update
    run_script(script, "--resume", name, cwd=chain.folder)
    assert (run_dir / "metrics.jsonl").read_text().startswith(kept)
    assert_same(chain.result(name), chain.whole(script))
    left = sorted(path.name[:19] for path in (chain.folder / "runs" / name).glob("checkpoint_*"))
    last = len(chain.whole(script).metrics)
    assert left == [f"checkpoint_{update:08d}" for update in (stopped_at, last)]


def half_written(run_dir):
    """Checkpoints under their temporary names, with the moment of the last write."""
    found = set()
    for path in run_dir.glob("checkpoint_*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ctime_ns))
    return found


def kill_until_done(chain, script, kills, *more):
    """SIGKILL at random moments, every second one while a checkpoint is written; resumed each time, at last to the end."""
    rng, name = random.Random(kills), f"killed_{script[:-3]}_{kills}"
    run_dir, halves, done, kept = chain.folder / "runs" / name, 0, [], ""
    for _ in range(kills):
        flags = ("--resume", name) if run_dir.exists() else chain.named(script, name, "--save-every", 1, *more)
        process, before = start(script, flags, chain.folder), half_written(run_dir)
        if len(done) % 2:
            while process.poll() is None and not half_written(run_dir) - before:
                pass
        else:
            wait_for_updates(process, run_dir, 1 + max([0, *done]))
            time.sleep(rng.uniform(0, 0.4))
        process.kill()
        halves += len(half_written(run_dir) - before)
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it was not done yet
        assert (run_dir / "metrics.jsonl").read_text().startswith(kept)
        done.append(len(read_metrics(run_dir)))
        kept = lines_up_to_checkpoint(run_dir)
    run_script(script, "--resume", name, cwd=chain.folder)
    assert kept and (run_dir / "metrics.jsonl").read_text().startswith(kept)
    print(f"{script}: updates at the kills {done}, half-written checkpoints at {halves}")
    assert halves and len(set(done)) > 1
    assert_same(chain.result(name), chain.whole(script, *more))


def test_three_kills_of_drpo_change_nothing(chain):
    kill_until_done(chain, "drpo.py", 3, "--total-episodes", 12 * 16)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_many_kills_change_nothing(chain, script):
    if script == "drpo.py":
        kill_until_done(chain, script, 20, "--total-episodes", 60 * 16)
    else:
        longer = ("--total-episodes", 24 * 16) if script == "ppo.py" else ("--num-epochs", 3)
        kill_until_done(chain, script, 5, *longer)


def test_what_a_stopped_run_accepts(chain):
    name, flags = "refusals", ("--num-ppo-epochs", 1)
    run_script("ppo.py", *chain.named("ppo.py", name, *flags), cwd=chain.folder)
    run_dir = chain.folder / "runs" / name
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    for more, message in (
        (("--kl-coef", 0.1), "--kl-coef is 0.05 in refusals and cannot change within a run"),
        (("--seed", 2), "--seed is 1 in refusals"),
        (("--total-episodes", 64), "--total-episodes is 112 in refusals and can only grow"),
    ):
        done = run_script("ppo.py", "--resume", name, *more, cwd=chain.folder, check=False)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    done = run_script("drpo.py", "--resume", name, cwd=chain.folder, check=False)
    assert done.returncode == 2 and "is a run of ppo.py" in done.stderr
    done = run_script("ppo.py", "--resume", "nowhere", cwd=chain.folder, check=False)
    assert done.returncode == 2 and "no such run" in done.stderr
    assert before == {path.name: path.read_bytes() for path in run_dir.iterdir()}
    run_script("ppo.py", "--resume", name, "--total-episodes", 144, cwd=chain.folder)
    metrics = read_metrics(run_dir)
    assert json.loads((run_dir / "args.json").read_text())["total_episodes"] == 144  # for the next --resume
    assert [line["update"] for line in metrics] == list(range(1, 10))
    assert metrics[7]["learning_rate"] > 0 and (chain.folder / f"out_{name}.1").exists()


def test_a_damaged_checkpoint_is_passed_over(chain):
    name = "damaged"
    run_script("drpo.py", *chain.named("drpo.py", name), cwd=chain.folder)
    run_dir = chain.folder / "runs" / name
    older, newest = sorted(run_dir.glob("checkpoint_*.pt"))
    newest.write_bytes(newest.read_bytes()[:-100] + bytes(100))
    done = run_script("drpo.py", "--resume", name, cwd=chain.folder)
    assert f"{newest.name} is damaged" in done.stdout and (run_dir / f"{newest.name}.damaged").exists()
    assert older.name[:19] == "checkpoint_00000006"
    assert_same(chain.result(name), chain.whole("drpo.py"))


def test_a_name_belongs_to_one_process(chain):
    flags = chain.named("drpo.py", "twice")
    both = [start("drpo.py", flags, chain.folder) for _ in range(2)]
    messages = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2]
    assert "another process" in messages[codes.index(2)] and "Traceback" not in messages[codes.index(2)]
    assert_same(chain.result("twice"), chain.whole("drpo.py"))


def test_nobody_resumes_a_run_that_is_running(chain):
    process = start("drpo.py", chain.named("drpo.py", "running"), chain.folder)
    wait_for_updates(process, chain.folder / "runs/running", 1)
    os.kill(process.pid, signal.SIGSTOP)
    done = run_script("drpo.py", "--resume", "running", cwd=chain.folder, check=False)
    os.kill(process.pid, signal.SIGCONT)
    assert done.returncode == 2 and "another process" in done.stderr
    process.communicate()
    assert process.returncode == 0
    assert_same(chain.result("running"), chain.whole("drpo.py"))


def test_the_second_interrupt_ends_at_once(chain):
    process = start("drpo.py", chain.named("drpo.py", "impatient", "--num-ppo-epochs", 100), chain.folder)
    wait_for_updates(process, chain.folder / "runs/impatient", 1)
    process.send_signal(signal.SIGTERM)
    read_until(process.stderr, "stopping after this update")
    process.send_signal(signal.SIGTERM)  # as torchrun and a scheduler may both send it
    time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == -signal.SIGINT and len(read_metrics(chain.folder / "runs/impatient")) == 1


def read_until(stream, text):
    found = ""
    while text not in found:
        found += stream.readline()
    return found


def test_nan_in_one_reward_is_named(chain):
    """A reward model whose embedding of one word is NaN; the word stands in one prompt alone."""
    models, folder = chain.models, chain.folder
    tokenizer = AutoTokenizer.from_pretrained(models.sft)
    rows = read_rows(models.reference / "train.jsonl")
    tokens = {number: set(tokenizer(row["prompt"])["input_ids"]) for number, row in enumerate(rows)}
    spare = next(iter(set(range(5, len(tokenizer))) - set().union(*tokens.values())))
    word, target = tokenizer.decode([spare]), 77
    assert tokenizer(word)["input_ids"] == [spare]

    def poison(rows):
        if len(rows) > target:
            rows[target]["prompt"] = word + rows[target]["prompt"]
        return rows

    data = write_dataset(folder / "poisoned", "reference", (256, 32, 32), poison)
    model = AutoModelForSequenceClassification.from_pretrained(models.reward)
    with torch.no_grad():
        model.get_input_embeddings().weight[spare] = float("nan")
    model.save_pretrained(folder / "poisoned_reward")
    tokenizer.save_pretrained(folder / "poisoned_reward")
    flags = chain.named("drpo.py", "poisoned", "--dataset", data, "--reward-path", folder / "poisoned_reward")
    done = run_script("drpo.py", *flags, "--total-episodes", 256, "--temperature", 0.1, cwd=folder, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    update = len(read_metrics(folder / "runs/poisoned")) + 1
    # where the response did not end, its score is --missing-eos-score instead
    assert re.search(
        rf"error: update {update}: not finite: (scores, )?values; rows {target} of --train-split\n", done.stderr
    )
    assert list((folder / "runs/poisoned").glob(f"checkpoint_{update - 1:08d}_*.pt"))
    assert not (folder / "out_poisoned").exists()


@pytest.mark.parametrize("script", ["sft.py", "drpo.py"])
def test_a_gradient_that_is_not_finite_is_named(chain, script):
    """The step before was finite and far too long; in drpo.py it was one of the same update."""
    name, rows = f"explodes_{script[:-3]}", 32 if script == "sft.py" else 16
    done = run_script(script, *chain.named(script, name, "--learning-rate", 1e30), cwd=chain.folder, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    pattern = r"error: update (\d+): not finite: loss.*; rows (.*) of --train-split\n"
    update, numbers = re.search(pattern, done.stderr).groups()
    assert len(numbers.split(", ")) == rows
    left = [path.name[:19] for path in (chain.folder / "runs" / name).glob("checkpoint_*")]
    assert (update, left) == (("2", ["checkpoint_00000001"]) if script == "sft.py" else ("1", []))


def test_a_full_disk_costs_one_line_and_no_checkpoint(chain, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        (disk / "runs").mkdir()
        process = start("drpo.py", chain.named("drpo.py", "full", "--keep-checkpoints", 1), disk)
        wait_for_updates(process, disk / "runs/full", 2)
        while not list((disk / "runs/full").glob("checkpoint_*.pt")):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGSTOP)
        before = {path: path.read_bytes() for path in (disk / "runs/full").glob("checkpoint_*.pt")}
        filler = disk / "filler"
        with open(filler, "wb") as file:
            left = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            file.write(bytes(left - 100_000))
        os.kill(process.pid, signal.SIGCONT)
        _, errors = process.communicate()
        assert process.returncode == 2 and "Traceback" not in errors
        assert "cannot write" in errors and "No space left" in errors
        found = {path: path.read_bytes() for path in (disk / "runs/full").glob("checkpoint_*")}
        assert before and found == before
        filler.unlink()
        run_script("drpo.py", "--resume", "full", "--output-dir", chain.folder / "out_full", cwd=disk)
        assert read_metrics(disk / "runs/full") == chain.whole("drpo.py").metrics
        assert read_weights(chain.folder / "out_full") == chain.whole("drpo.py").weights
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_checkpoint_is_read_without_pickle(chain, script):
    name = f"whole_{script[:-3]}"
    chain.whole(script)
    newest = sorted((chain.folder / "runs" / name).glob("checkpoint_*.pt"))[-1]
    state = torch.load(newest, weights_only=True)
    assert state["update"] == len(read_metrics(chain.folder / "runs" / name))
    assert state["parameters"].keys() and all(tensor.isfinite().all() for tensor in state["parameters"].values())
    assert json.loads((chain.folder / "runs" / name / "args.json").read_text())["resume"] == ""
