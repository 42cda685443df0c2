"""Stopped, killed, broken and full: a run goes on from its last whole checkpoint as if nothing had happened.

Tested on toy.py, which uses plumbing/ as the real scripts do, and with one stop of every real script.
"""

import contextlib
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ROOT, read_metrics, read_rows, run_here, run_script, write_dataset
from filelock import FileLock
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from plumbing.runs import Run

TOY = ROOT / "tests/toy.py"
EVERY = ("--save-every", 1, "--keep-checkpoints", 99)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def toy(*flags, script=TOY):
    """The toy within this process, which saves its start."""
    return run_here(script, *flags, cwd=".", check=False)


def good(*flags):
    done = toy(*flags)
    assert done.returncode == 0, done.stderr
    return done


def refused(*flags, script=TOY):
    """-> the one line that the toy ends with."""
    done = toy(*flags, script=script)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def start(script, *flags, cwd="."):
    """A script in the background, in a session of its own."""
    command = [sys.executable, str(ROOT / script), *(str(flag) for flag in flags)]
    return subprocess.Popen(command, cwd=cwd, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def wait_for_updates(process, run_dir, count):
    """Until metrics.jsonl has the lines of `count` updates, and that of the untouched model."""
    path = run_dir / "metrics.jsonl"
    wait_for(process, lambda: path.exists() and path.read_text().count("\n") > count)


def checkpoints(run_dir):
    """Update -> file."""
    return {int(path.name[11:19]): path for path in sorted(run_dir.glob("checkpoint_*.pt"))}


def lines_up_to_checkpoint(run_dir):
    """What a resumed run must keep of metrics.jsonl, byte for byte: an update computed again has other times."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    return "".join(lines[: max(checkpoints(run_dir), default=0)])


def go_back(run_dir, update):
    """As if the process had been killed some updates after that checkpoint."""
    for number, path in checkpoints(run_dir).items():
        if number > update:
            path.unlink()


def assert_same(run_dir, expected):
    """Two runs have the same numbers, and the same last checkpoint but for the learning rate of optimizers."""
    assert read_metrics(run_dir) == read_metrics(expected)
    found, wanted = (torch.load(list(checkpoints(path).values())[-1]) for path in (run_dir, expected))
    assert found["update"] == wanted["update"] == len(read_metrics(expected)) and wanted["parameters"]
    assert found["history"] == wanted["history"]
    for part in ("parameters", "state"):
        assert_close(found[part], wanted[part], rtol=0, atol=0)
    assert_close(found["optimizer"]["state"], wanted["optimizer"]["state"], rtol=0, atol=0)


# what a run leaves
def test_what_a_run_leaves(folder):
    done = good("--run-name", "left", "--save-every", 3)
    run_dir = folder / "runs/left"
    assert list(checkpoints(run_dir)) == [6, 8]  # the newest two: every third, and the last
    assert json.loads((run_dir / "result.json").read_text())["toy"]["error"] < 1.5
    assert (run_dir / "run.png").stat().st_size > 5000 and not list(folder.rglob("*.tmp"))
    args = json.loads((run_dir / "args.json").read_text())
    assert args["script"] == "toy.py" and args["width"] == 16 and args["resume"] == ""
    assert [line["update"] for line in read_metrics(run_dir)] == list(range(1, 9))
    assert "time/update" in json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[1])
    assert "runs/left" in done.stdout and "16 rows" in done.stdout


def test_the_number_of_checkpoints(folder):
    good("--run-name", "three", "--save-every", 1, "--keep-checkpoints", 3)
    assert list(checkpoints(folder / "runs/three")) == [6, 7, 8]


def test_the_checkpoint_is_read_without_pickle(folder):
    good("--run-name", "read")
    saved = torch.load(checkpoints(folder / "runs/read")[8], weights_only=True)
    assert saved["update"] == 8 and saved["state"]["before"].shape == (16,)
    assert [point["epoch"] for point in saved["history"]] == list(range(9))
    shapes = {name: tensor.shape for name, tensor in saved["parameters"].items()}
    assert shapes == {"weight": (16, 16), "bias": (16,)}


# going on
@pytest.mark.parametrize("update", [0, 3, 7, 8])
def test_a_run_goes_on_as_if_nothing_had_happened(folder, update):
    """Killed before its first checkpoint, in the middle, before its last one, and when it was done."""
    good("--run-name", "whole")
    good("--run-name", "broken", *EVERY)
    run_dir = folder / "runs/broken"
    go_back(run_dir, update)
    kept = lines_up_to_checkpoint(run_dir)
    good("--resume", "broken")
    assert (run_dir / "metrics.jsonl").read_text().startswith(kept) and kept.count("\n") == update
    assert_same(run_dir, folder / "runs/whole")


def test_what_was_half_written_goes(folder):
    good("--run-name", "whole")
    good("--run-name", "half", *EVERY)
    run_dir = folder / "runs/half"
    go_back(run_dir, 5)
    (run_dir / "checkpoint.tmp").write_bytes(checkpoints(run_dir)[5].read_bytes()[:1000])
    (run_dir / "args.json.tmp").write_text("{")
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"update": 9, "lo')
    good("--resume", "half")
    assert not list(folder.rglob("*.tmp"))
    assert_same(run_dir, folder / "runs/whole")


def test_what_a_user_keeps_in_a_run_stays(folder):
    good("--run-name", "half.tmp")  # a name like that of a temporary folder
    good("--run-name", "half")
    own = [folder / "runs/half" / name for name in ("notes.tmp", "checkpoint_mine.tmp", "folder.tmp/file")]
    (folder / "runs/half/folder.tmp").mkdir()
    for path in own:
        path.write_text("kept")
    good("--resume", "half")
    assert [path.read_text() for path in own] == ["kept"] * 3 and (folder / "runs/half.tmp/result.json").exists()


@pytest.mark.parametrize("damaged", [(8,), (7, 8), range(1, 9)])
def test_a_damaged_checkpoint_is_passed_over(folder, damaged):
    good("--run-name", "whole")
    good("--run-name", "damaged", *EVERY)
    run_dir = folder / "runs/damaged"
    for update in damaged:
        path = checkpoints(run_dir)[update]
        path.write_bytes(path.read_bytes()[:-100] + bytes(100 * (update % 2)))  # cut, or with a hole
    names = [checkpoints(run_dir)[update].name for update in damaged]
    kept = "".join((run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)[: 8 - len(damaged)])
    done = good("--resume", "damaged")
    assert all(f"{name} is damaged" in done.stdout and (run_dir / f"{name}.damaged").exists() for name in names)
    assert (run_dir / "metrics.jsonl").read_text().startswith(kept)
    assert_same(run_dir, folder / "runs/whole")


def foreign(run_dir, change):
    """The newest checkpoint as `change` of what it holds makes it, under a name with the right checksum."""
    path = checkpoints(run_dir)[8]
    saved = torch.load(path, weights_only=True)
    made = change(saved)
    if isinstance(made, bytes):
        path.write_bytes(made)
    else:
        torch.save(saved if made is None else made, path)
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(run_dir / f"checkpoint_00000008_{checksum}.pt")


FOREIGN = {
    "a pickle": lambda saved: pickle.dumps(print),
    "a pickle of torch": lambda saved: SimpleNamespace(saved=saved),
    "text": lambda saved: b"checkpoint",
    "nothing": lambda saved: b"",
    "a list": lambda saved: [1, 2],
    "other keys": lambda saved: {"model": saved["parameters"]},
    "no id": lambda saved: saved.pop("id") and None,
    "another run": lambda saved: saved.update(id="0" * 32),
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_checkpoint_is_passed_over(folder, change):
    good("--run-name", "whole")
    good("--run-name", "foreign", *EVERY)
    path = foreign(folder / "runs/foreign", change)
    done = good("--resume", "foreign")
    assert f"note: {path.relative_to(folder)} is damaged or of another run" in done.stdout
    assert done.stdout.count("note:") == 1 and path.with_name(f"{path.name}.damaged").exists()
    assert_same(folder / "runs/foreign", folder / "runs/whole")


def test_a_checkpoint_of_another_run_is_passed_over(folder):
    """Copied under its own name, which holds its checksum, into a run with the very same flags but another seed."""
    good("--run-name", "whole")
    good("--run-name", "here", *EVERY)
    good("--run-name", "there", "--seed", 2)
    run_dir, (path,) = folder / "runs/here", checkpoints(folder / "runs/there").values()
    go_back(run_dir, 5)
    shutil.copy(path, run_dir)
    assert f"{path.name} is damaged or of another run" in good("--resume", "here").stdout
    assert_same(run_dir, folder / "runs/whole")


def test_a_run_from_before_there_were_ids_goes_on(folder):
    good("--run-name", "old", *EVERY)
    foreign(folder / "runs/old", lambda saved: {key: saved[key] for key in saved.keys() - {"id", "inputs"}})
    args = json.loads((folder / "runs/old/args.json").read_text())
    (folder / "runs/old/args.json").write_text(json.dumps({key: args[key] for key in args.keys() - {"id"}}))
    for _ in range(2):
        assert "note" not in good("--resume", "old").stdout


def test_a_run_goes_on_with_the_same_inputs_or_not_at_all(folder):
    (folder / "rows").write_text("some")
    good("--run-name", "same", *EVERY)
    run_dir = folder / "runs/same"
    go_back(run_dir, 5)
    good("--resume", "same")
    go_back(run_dir, 5)
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    (folder / "rows").write_text("others")
    assert refused("--resume", "same") == "error: --resume same: changed since the run began: rows, train\n"
    assert before == {path.name: path.read_bytes() for path in run_dir.iterdir()}


@pytest.mark.parametrize("script, name", [("sft.py", "reference, train"), ("sft.py", "model"), ("drpo.py", "reward")])
def test_a_real_run_knows_its_data_and_models(folder, models, script, name):
    flags = list(flags_of(script, models))
    for place, value in enumerate(flags):
        if isinstance(value, Path) and value.is_dir():
            flags[place] = shutil.copytree(value, folder / value.name)
    if name == "model":
        name = "tiny_pythia"
    flags += ["--num-epochs", 1] if script == "sft.py" else ["--total-episodes", 16]
    run_here(script, *flags, "--run-name", "mine", "--output-dir", "out", cwd=folder)
    changed = folder / name.split(",")[0]
    changed = next(changed / file for file in ("train.jsonl", "config.json") if (changed / file).exists())
    text = changed.read_text()
    changed.write_text("\n".join([*text.splitlines()[1:], text.splitlines()[0]]) if "train" in name else f"{text} ")
    done = run_here(script, "--resume", "mine", cwd=folder, check=False)
    assert done.returncode == 2
    assert f"error: --resume mine: changed since the run began: {folder / name}\n" in done.stderr


def test_what_a_resumed_run_refuses(folder):
    good("--run-name", "refusals")
    run_dir = folder / "runs/refusals"
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    for flags, message in (
        (("--learning-rate", 0.1), "--learning-rate is 0.01 in refusals and cannot change within a run"),
        (("--seed", 2), "--seed is 1 in refusals"),
        (("--run-name", "other"), "--run-name is 'refusals' in refusals"),
        (("--dtype", "bfloat16"), "--dtype is 'float32' in refusals"),
        (("--num-epochs", 4), "--num-epochs is 8 in refusals and can only grow"),
    ):
        assert message in refused("--resume", "refusals", *flags)
    shutil.copy(TOY, folder / "other.py")
    assert "is a run of toy.py" in refused("--resume", "refusals", script=folder / "other.py")
    assert "there is no such run" in refused("--resume", "nowhere")
    for name in ("refusals/", "../runs/refusals", folder / "runs/refusals", "..", ".refusals", " ", "refusals "):
        for flag in ("--resume", "--run-name"):
            assert f"{flag} {str(name)!r} must be a plain name" in refused(flag, name)
    assert "already exists" in refused("--run-name", "refusals")
    assert before == {path.name: path.read_bytes() for path in run_dir.iterdir()}


def test_what_a_resumed_run_may_change(folder):
    good("--run-name", "changed")
    run_dir = folder / "runs/changed"
    flags = {"save_every": 2, "keep_checkpoints": 4, "output_dir": "elsewhere", "num_epochs": 12}
    flags |= {"process_timeout": 60, "micro_batch_size": 4}
    done = good("--resume", "changed", *(x for name, value in flags.items() for x in (f"--{name}", value)))
    saved = json.loads((run_dir / "args.json").read_text())
    assert {name: saved[name] for name in flags} == flags  # for the next --resume
    assert [line["update"] for line in read_metrics(run_dir)] == list(range(1, 13))
    assert list(checkpoints(run_dir)) == [8, 10, 12] and "elsewhere" in done.stdout
    good("--resume", "changed", "--gradient-checkpointing")


# one process a run
def test_a_run_that_is_locked(folder):
    good("--run-name", "locked")
    with FileLock(folder / "runs/locked/.lock"):
        assert "another process" in refused("--resume", "locked")
    good("--resume", "locked")


@pytest.mark.parametrize("take", [lambda run: run.open({}, mock.Mock()), lambda run: run.keep({"table.md": "mine"})])
def test_a_name_that_another_took_meanwhile(take, folder, capsys):
    run = Run(SimpleNamespace(run_name="taken", seed=1))
    (folder / "runs/taken").mkdir(parents=True)
    with pytest.raises(SystemExit):
        take(run)
    assert "where another process may be at work" in capsys.readouterr().err
    assert {path.name for path in (folder / "runs/taken").iterdir()} <= {".lock"}


@pytest.mark.slow
def test_a_name_belongs_to_one_process(folder):
    good("--run-name", "whole", "--wait", 0.1)
    both = [start(TOY, "--run-name", "twice", "--wait", 0.1) for _ in range(2)]
    messages = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], messages
    assert re.search("another process|already exists", messages[codes.index(2)])
    assert "Traceback" not in messages[codes.index(2)]
    assert_same(folder / "runs/twice", folder / "runs/whole")


def test_nobody_resumes_a_run_that_is_running(folder):
    good("--run-name", "whole")
    process = start(TOY, "--run-name", "running", "--wait", 0.1)
    wait_for_updates(process, folder / "runs/running", 1)
    os.kill(process.pid, signal.SIGSTOP)
    message = refused("--resume", "running")
    os.kill(process.pid, signal.SIGCONT)
    assert "another process" in message
    process.communicate()
    assert process.returncode == 0
    assert_same(folder / "runs/running", folder / "runs/whole")


# signals
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_a_run_after_its_update(folder, number):
    good("--run-name", "whole")
    process = start(TOY, "--run-name", "stopped", "--wait", 0.2)
    run_dir = folder / "runs/stopped"
    wait_for_updates(process, run_dir, 2)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors
    stopped_at = len(read_metrics(run_dir))
    assert 2 <= stopped_at < 8 and list(checkpoints(run_dir)) == [stopped_at]
    assert f"stopped after update {stopped_at} of 8; to go on: --resume stopped" in errors
    assert not (run_dir / "result.json").exists()
    kept = (run_dir / "metrics.jsonl").read_text()
    good("--resume", "stopped")
    assert (run_dir / "metrics.jsonl").read_text().startswith(kept)
    assert list(checkpoints(run_dir)) == [stopped_at, 8]
    assert_same(run_dir, folder / "runs/whole")


def read_until(stream, text):
    found = ""
    while text not in found:
        found += (character := stream.read(1))
        assert character, found


def test_the_second_interrupt_ends_at_once(folder):
    process = start(TOY, "--run-name", "impatient", "--wait", 20)
    read_until(process.stderr, "0/8")  # the bar of the updates
    process.send_signal(signal.SIGTERM)
    read_until(process.stderr, "stopping after this update")
    process.send_signal(signal.SIGTERM)  # as torchrun and a scheduler may both send it
    time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == -signal.SIGINT and not checkpoints(folder / "runs/impatient")


# kills
def half_written(run_dir):
    """Checkpoints under their temporary names, with the moment of the last write."""
    found = set()
    for path in run_dir.glob("checkpoint.tmp"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ctime_ns))
    return found


@pytest.mark.parametrize("kills, count", [(3, 40), pytest.param(40, 400, marks=pytest.mark.slow)])
def test_kills_change_nothing(folder, kills, count):
    """SIGKILL at random moments, every second one while a checkpoint is written; resumed each time, at last to the end."""
    flags = ("--width", 600, "--num-epochs", count)
    rng, run_dir, halves, done, kept = random.Random(kills), folder / "runs/killed", 0, [], ""
    for _ in range(kills):
        resume = ("--resume", "killed") if run_dir.exists() else ("--run-name", "killed", "--save-every", 1, *flags)
        process = start(TOY, *resume, *(() if run_dir.exists() else ("--wait", 0.03)))
        before = half_written(run_dir)
        if len(done) % 2:
            while process.poll() is None and not half_written(run_dir) - before:
                pass
        else:
            wait_for_updates(process, run_dir, 1 + max([0, *done]))
            time.sleep(rng.uniform(0, 0.1))
        process.kill()
        halves += len(half_written(run_dir) - before)
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it was not done yet
        assert (run_dir / "metrics.jsonl").read_text().startswith(kept)
        done.append((run_dir / "metrics.jsonl").read_text().count("\n"))
        kept = lines_up_to_checkpoint(run_dir)
    good("--resume", "killed")
    print(f"updates at the kills {done}, half-written checkpoints at {halves}")
    assert kept and (run_dir / "metrics.jsonl").read_text().startswith(kept)
    assert halves and len(set(done)) > 1 and not list(run_dir.glob("*.tmp"))
    good("--run-name", "whole", *flags)
    assert_same(run_dir, folder / "runs/whole")


# full disk
@contextlib.contextmanager
def small_disk(path, size):
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.slow
def test_a_full_disk_costs_one_line_and_no_checkpoint(folder):
    flags = ("--width", 600)
    good("--run-name", "whole", *flags)
    with small_disk(folder / "disk", "24m") as disk:
        flags += ("--run-name", "full", "--wait", 0.1, "--save-every", 2, "--keep-checkpoints", 1)
        process, run_dir = start(TOY, *flags, cwd=disk), disk / "runs/full"
        wait_for(process, lambda: checkpoints(run_dir))
        os.kill(process.pid, signal.SIGSTOP)
        before = {path: path.read_bytes() for path in checkpoints(run_dir).values()}
        with open(disk / "filler", "wb") as file:
            file.write(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 100_000))
        os.kill(process.pid, signal.SIGCONT)
        _, errors = process.communicate()
        assert process.returncode == 2 and "Traceback" not in errors
        assert "error: cannot write" in errors and "No space left" in errors
        assert before and before == {path: path.read_bytes() for path in run_dir.glob("checkpoint_*")}
        (disk / "filler").unlink()
        run_script(TOY, "--resume", "full", cwd=disk)
        assert_same(run_dir, folder / "runs/whole")


# not finite
def test_nan_in_one_row_is_named(folder):
    done = toy("--run-name", "nan", "--nan-at", 3, "--save-every", 1)
    assert done.returncode == 2 and "error: update 3: not finite: errors; rows 5 of --train-split\n" in done.stderr
    run_dir = folder / "runs/nan"
    assert list(checkpoints(run_dir)) == [1, 2] and not (run_dir / "result.json").exists()


def test_a_loss_that_is_not_finite_is_named(folder):
    done = toy("--run-name", "explodes", "--learning-rate", 1e30)  # the first of two steps is far too long
    assert done.returncode == 2
    names, rows = re.search(r"error: update 1: not finite: (.*); rows (.*) of --train-split\n", done.stderr).groups()
    assert names == "norm, loss" and len(rows.split(", ")) == 5 and rows.endswith(" and 3 more")
    done = toy("--run-name", "one_step", "--learning-rate", 1e30, "--minibatch-size", 16)
    assert done.returncode == 2 and "error: update 2: not finite: errors; rows 0, 1, 2, 3, 4 and 11 more" in done.stderr


NOT_FINITE = {
    "train": "logprobs, ref_logprobs; rows 7 of --train-split",
    "validation": "eval/kl",
}


@pytest.mark.parametrize("split", NOT_FINITE)
def test_nan_of_a_policy_is_named(folder, models, split):
    """Weights that overflow at one word: in the first evaluation, or in a rollout, where they make no probability."""
    tokenizer = AutoTokenizer.from_pretrained(models.sft)
    rows = {name: read_rows(models.reference / f"{name}.jsonl") for name in ("train", "validation", "test")}
    text = " ".join(row["prompt"] + row["completion"] for part in rows.values() for row in part)
    spare = next(iter(set(range(300, len(tokenizer))) - set(tokenizer(text)["input_ids"])))
    rows[split][7]["prompt"] = tokenizer.decode([spare]) + rows[split][7]["prompt"]
    (folder / "data").mkdir()
    for name, part in rows.items():
        (folder / f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    model = AutoModelForCausalLM.from_pretrained(models.sft)
    with torch.no_grad():
        model.get_input_embeddings().weight[spare] = 3e38 * (-1.0) ** torch.arange(64)
    for kind in (model, tokenizer):
        kind.save_pretrained(folder / "sft")
    flags = (*models.flags, "--dataset", folder / "data", "--sft-path", folder / "sft", "--run-name", "nan")
    sizes = ("--total-episodes", 256, "--batch-size", 256, "--minibatch-size", 256, "--temperature", 0.1)
    done = run_here("drpo.py", *flags, *sizes, cwd=folder, check=False)
    assert done.returncode == 2
    expected = f"error: update {int(split == 'train')}: not finite: {NOT_FINITE[split]}"
    assert expected in done.stderr.splitlines()


# the end
def test_samples_and_table_come_after_everything_is_saved(folder, monkeypatch):
    done = good("--run-name", "end").stdout
    assert re.search("a sample\nanother\n(.*\n)*\n16 rows.*\n(.*\n)*\nfinal model: out", done)

    def broken(*_, **__):
        assert (folder / "runs/broken/result.json").exists() and (folder / "runs/broken/run.png").exists()
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == [signal.SIG_DFL] * 2
        with FileLock(folder / "runs/broken/.lock", timeout=0):  # free
            raise KeyError("printing")

    monkeypatch.setattr("plumbing.runs.barrier", lambda last=False: last and broken())
    with pytest.raises(KeyError, match="printing"):
        toy("--run-name", "broken")


def test_ctrl_c_is_a_quiet_end_outside_of_the_updates(folder):
    code = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background of a shell does not have
sys.path.insert(0, {str(ROOT)!r})
from dataclasses import dataclass
from plumbing.flags import read_args
@dataclass
class Args:
    seed: int = 1
read_args(Args)
print("ready", file=sys.stderr)
time.sleep(60)
"""
    (folder / "waits.py").write_text(code)
    process = start(folder / "waits.py")
    read_until(process.stderr, "ready")
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1].strip() == "" and process.returncode == -signal.SIGINT  # 130 in a shell


# the real scripts
SLOW = (
    "sft.py",
    "dpo.py",
    "reward_model.py",
    "dpo_ln.py",
    "ppo.py",
    "rto.py",
    "online_dpo.py",
    "rejection_sampling.py",
)
SCRIPTS = ["drpo.py", "xpo.py", *(pytest.param(script, marks=pytest.mark.slow) for script in SLOW)]


def flags_of(script, models):
    """A run of seven to nine updates."""
    if script in models.rl:
        steps = ("--total-episodes", 112, "--batch-size", 16, "--minibatch-size", 16, "--eval-every", 3)
        return (*models.rl[script], *steps, "--eval-rows", 8)
    if script == "rejection_sampling.py":
        steps = ("--prompts-per-step", 8, "--samples-per-prompt", 8, "--num-steps", 2, "--updates-per-step", 4)
        return (*models.flags, *steps, "--batch-size", 16, "--eval-every", 3, "--eval-rows", 8)
    if script in ("online_dpo.py", "xpo.py"):  # of three rounds, one of which the stop falls into
        steps = ("--total-episodes", 96, "--prompts-per-round", 8, "--samples-per-prompt", 4, "--updates-per-round", 3)
        more = ("--alpha", 0.1, "--second-reference") if script == "xpo.py" else ()
        return (*models.flags, *steps, "--batch-size", 8, "--eval-every", 2, "--eval-rows", 8, *more)
    if script == "sft.py":
        data = ("--dataset", models.reference, "--base-model", ROOT / "data/tiny_pythia")
    else:
        data = ("--dataset", models.preference, "--sft-path", models.sft)
    more = {
        "dpo.py": ("--eval-every", 3),
        "dpo_ln.py": ("--eval-every", 3),
        "reward_model.py": ("--reference-dataset", models.reference),
    }
    return (*data, "--num-epochs", 1, "--batch-size", 32, *more.get(script, ()))


def read_weights(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_stopped_and_resumed_equals_undisturbed(folder, models, script):
    flags, run_dir = flags_of(script, models), folder / "runs/stopped"
    run_here(script, *flags, "--run-name", "whole", "--output-dir", "out_whole", cwd=folder)
    process = start(script, *flags, "--run-name", "stopped", "--output-dir", "out_stopped")
    wait_for_updates(process, run_dir, 2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 1 and "to go on: --resume stopped" in errors and "Traceback" not in errors
    kept, stopped_at = (run_dir / "metrics.jsonl").read_text(), len(read_metrics(run_dir))
    assert 2 <= stopped_at < 7 and list(checkpoints(run_dir)) == [stopped_at]
    assert not (folder / "out_stopped").exists()
    run_here(script, "--resume", "stopped", cwd=folder)
    assert (run_dir / "metrics.jsonl").read_text().startswith(kept)
    assert_same(run_dir, folder / "runs/whole")
    weights = read_weights(folder / "out_whole")
    assert weights and read_weights(folder / "out_stopped") == weights
    results = [json.loads((folder / "runs" / name / "result.json").read_text()) for name in ("whole", "stopped")]
    assert results[0] == results[1]


@pytest.mark.slow
def test_nan_in_one_reward_is_named(folder, models):
    """drpo.py with a reward model whose embedding of one word overflows; the word stands in one prompt alone."""
    tokenizer = AutoTokenizer.from_pretrained(models.sft)
    rows = read_rows(models.reference / "train.jsonl")
    tokens = {number: set(tokenizer(row["prompt"])["input_ids"]) for number, row in enumerate(rows)}
    spare = next(iter(set(range(20, len(tokenizer))) - set().union(*tokens.values())))
    word, target = tokenizer.decode([spare]), 77
    assert tokenizer(word)["input_ids"] == [spare]

    def poison(rows):
        if len(rows) > target:
            rows[target]["prompt"] = word + rows[target]["prompt"]
        return rows

    data = write_dataset(folder / "poisoned", "reference", (256, 32, 32), poison)
    model = AutoModelForSequenceClassification.from_pretrained(models.reward)
    with torch.no_grad():
        model.get_input_embeddings().weight[spare] = 3e38 * (-1.0) ** torch.arange(64)
    model.save_pretrained(folder / "poisoned_reward")
    tokenizer.save_pretrained(folder / "poisoned_reward")
    flags = (*flags_of("drpo.py", models), "--dataset", data, "--reward-path", folder / "poisoned_reward")
    flags += ("--total-episodes", 256, "--temperature", 0.1, "--run-name", "poisoned", "--output-dir", "out")
    done = run_script("drpo.py", *flags, cwd=folder, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    update = len(read_metrics(folder / "runs/poisoned")) + 1
    # where the response did not end, its score is --missing-eos-score instead
    names = f"error: update {update}: not finite: (scores, )?values"
    assert re.search(rf"{names}; rows {target} of --train-split\n", done.stderr)
    assert not (folder / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script, update", [("sft.py", 2), ("drpo.py", 1)])
def test_a_gradient_that_is_not_finite_is_named(folder, models, script, update):
    """The step before was finite and far too long; in drpo.py it was one of the same update."""
    flags = (*flags_of(script, models), "--learning-rate", 1e30, "--run-name", "explodes", "--output-dir", "out")
    done = run_script(script, *flags, cwd=folder, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    pattern = rf"error: update {update}: not finite: loss.*; rows (.*) of --train-split\n"
    assert re.search(pattern, done.stderr)[1].endswith(f" and {(32 if script == 'sft.py' else 16) - 5} more")
