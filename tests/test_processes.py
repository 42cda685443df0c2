"""torchrun with two processes and more: the same rollouts, the same numbers to rounding, no hang when one of them goes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_model, read_metrics, read_rows, run_script
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import drpo

PAIRS = ("--num-epochs", 1, "--batch-size", 32, "--micro-batch-size", 8)
STEPS = ("--total-episodes", 48, "--batch-size", 16, "--minibatch-size", 8, "--micro-batch-size", 4)
STEPS += ("--eval-every", 2, "--eval-rows", 7, "--num-ppo-epochs", 2)


def torchrun(processes, *command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, *(str(part) for part in command)]


def flags_of(script, models):
    if script in ("ppo.py", "drpo.py", "drpo_fsdp.py"):
        return (*models.flags, *STEPS)
    if script == "sft.py":
        return ("--dataset", models.reference, "--base-model", ROOT / "data/tiny_pythia", *PAIRS)
    more = ("--reference-dataset", models.reference) if script == "reward_model.py" else ("--eval-every", 3)
    return ("--dataset", models.preference, "--sft-path", models.sft, *PAIRS, *more)


def run(processes, script, name, models, *flags):
    """-> metrics, output; one process without torchrun."""
    command = (*flags_of(script, models), "--run-name", name, "--output-dir", f"out_{name}", *flags)
    if processes == 1:
        done = run_script(script, *command, cwd=models.folder)
    else:
        launched = torchrun(processes, ROOT / script, *command)
        done = subprocess.run(launched, cwd=models.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(models.folder / "runs" / name), done.stdout


SLOW = [("reward_model.py", 2), ("dpo.py", 2), ("ppo.py", 2), ("drpo.py", 4)]
COUNTS = [
    ("sft.py", 2),
    ("drpo.py", 2),
    ("drpo_fsdp.py", 2),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
]


@pytest.mark.parametrize("script, processes", COUNTS)
def test_the_number_of_processes_changes_rounding_alone(script, processes, models):
    name = f"{script[:-3]}_of_{processes}"
    more = ["--gradient-checkpointing"] * (script == "drpo_fsdp.py")  # hooks within hooks
    found, printed = run(processes, script, name, models, *more)
    expected, alone = run(1, script.replace("_fsdp", ""), f"{name}_alone", models)
    assert len(found) == len(expected) > 2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if key == "accuracy" and ours["update"] == 1 and script == "dpo.py":
                continue  # both policies are the reference: margins are 0 up to rounding, and so is their sign
            assert ours[key] == pytest.approx(value, rel=2e-3, abs=2e-4), (ours["update"], key)
    for key in ("response/length", "reset/length", "reset/fraction"):  # the same rollouts
        assert [line.get(key) for line in found] == [line.get(key) for line in expected]
    assert printed.count("metrics, arguments") == alone.count("metrics, arguments") == 1
    weights, others = (load_file(models.folder / f"out_{run}/model.safetensors") for run in (name, f"{name}_alone"))
    assert weights.keys() == others.keys()
    for key, tensor in weights.items():
        assert_close(tensor, others[key], rtol=1e-2, atol=1e-4)


WORKER = """
import sys
import torch
sys.path[:0] = sys.argv[1:3]
import conftest, drpo
drpo.start_processes(60)
policy = conftest.random_model(conftest.AutoModelForCausalLM, 0)
tensors = torch.load(sys.argv[3])
ids = drpo.in_chunks(drpo.generate, policy, 3, *tensors, key=tensors[-1], eos=0, temperature=0.9)
chunks = [ids, drpo.in_chunks(drpo.generate, policy, 3, *(tensor[:1] for tensor in tensors), eos=0, temperature=0.9)]
torch.save(chunks, f"{sys.argv[4]}.{drpo.dist.get_rank()}")
"""


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_rollouts_token_for_token(processes, tmp_path):
    rng = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 20, (13,), generator=rng).tolist()
    prompts = [torch.randint(2, 1024, (n,), generator=rng).tolist() for n in lengths]
    budget = torch.randint(1, 12, (13,), generator=rng)
    tensors = (*drpo.pad(prompts, "left", "cpu"), torch.rand(13, 12, generator=rng), budget)
    torch.save(tensors, tmp_path / "in.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    command = torchrun(processes, tmp_path / "worker.py", ROOT, ROOT / "tests", tmp_path / "in.pt", tmp_path / "out")
    subprocess.run(command, check=True, capture_output=True)
    policy = random_model(AutoModelForCausalLM, 0)
    expected = drpo.in_chunks(drpo.generate, policy, 13, *tensors, eos=0, temperature=0.9)
    assert len(set(map(tuple, expected.tolist()))) > 10  # rows differ, so an order mixed up would show
    for rank in range(processes):
        ids, first = torch.load(tmp_path / f"out.{rank}")
        assert_close(ids, expected)
        assert_close(first, expected[:1])


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_completions_do_not_depend_on_the_number_of_processes(processes, models):
    """judge.py: as many rows as leave the last batch incomplete, and one table, from the same completions."""
    files, tables = [], []
    for count in (1, processes):
        name = f"judge_{processes}_{count}"
        command = [
            *models.flags,
            "--policies",
            models.sft,
            "--split",
            "train",
            "--num-prompts",
            45,
            "--judge",
            "rubric",
        ]
        command += ["--micro-batch-size", 8, "--cache-dir", name, "--run-name", name]
        if count == 1:
            done = run_script("judge.py", *command, cwd=models.folder)
        else:
            launched = torchrun(count, ROOT / "judge.py", *command)
            done = subprocess.run(launched, cwd=models.folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
        (file,) = (models.folder / name).glob("*.jsonl")
        files.append(read_rows(file))
        tables.append(done.stdout[done.stdout.index("win rate") :].replace(name, ""))
    alone, shared = files
    assert len(alone) == len(shared) == 45 and len({line["completion"] for line in alone}) > 10
    for ours, theirs in zip(shared, alone):
        assert ours.pop("kl") == pytest.approx(theirs.pop("kl"), rel=1e-4, abs=1e-4)
        assert ours == theirs
    assert tables[0] == tables[1]


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start(processes, name, models, *flags, script="drpo.py"):
    """Processes under way; -> torchrun, worker pids by rank."""
    command = (*flags_of(script, models), "--total-episodes", 1600, "--save-every", 1, *flags)
    launched = torchrun(processes, ROOT / script, *command, "--run-name", name, "--output-dir", f"out_{name}")
    job = subprocess.Popen(launched, cwd=models.folder, stderr=subprocess.PIPE, text=True, start_new_session=True)
    path = models.folder / "runs" / name / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") > 1):
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.05)
    ranks = {}
    for pid in children(job.pid):
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        ranks |= {int(entry[5:]): pid for entry in environment if entry.startswith("RANK=")}
    assert sorted(ranks) == list(range(processes))
    return job, ranks


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_dead_process_ends_the_job(models, rank):
    job, ranks = start(2, f"death_of_{rank}", models)
    os.kill(ranks[rank], signal.SIGKILL)
    _, errors = job.communicate(timeout=100)
    assert job.returncode != 0 and "Signal 9 (SIGKILL)" in errors


@pytest.mark.slow
def test_a_stalled_process_ends_the_job(models):
    job, ranks = start(2, "stall", models, "--process-timeout", 5)
    os.kill(ranks[1], signal.SIGSTOP)
    _, errors = job.communicate(timeout=200)
    assert job.returncode != 0 and "Timed out" in errors


def test_a_stopped_job_goes_on_with_any_number_of_processes(models):
    job, _ = start(2, "stopped_job", models, "--save-every", 1000)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=100)
    assert job.returncode != 0 and "to go on: --resume stopped_job" in errors
    done, kept = (
        len(read_metrics(models.folder / "runs/stopped_job")),
        (models.folder / "runs/stopped_job/metrics.jsonl").read_text(),
    )
    assert list((models.folder / "runs/stopped_job").glob(f"checkpoint_{done:08d}_*.pt"))
    wanted = done + 2
    resume = ("--resume", "stopped_job", "--total-episodes", 1600, "--save-every", 1000)
    job = subprocess.Popen(
        [sys.executable, str(ROOT / "drpo.py"), *map(str, resume)], cwd=models.folder, stderr=subprocess.DEVNULL
    )
    while len(read_metrics(models.folder / "runs/stopped_job")) < wanted:
        assert job.poll() is None
        time.sleep(0.05)
    job.kill()
    job.wait()
    assert (models.folder / "runs/stopped_job/metrics.jsonl").read_text().startswith(kept)  # times too: not done again
    updates = [line["update"] for line in read_metrics(models.folder / "runs/stopped_job")]
    assert updates == list(range(1, len(updates) + 1))


def test_sharding_needs_torchrun(models):
    done = run_script("drpo_fsdp.py", *flags_of("drpo_fsdp.py", models), cwd=models.folder, check=False)
    assert done.returncode == 2 and "torchrun" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["part", "manifest"])
def test_a_sharded_run_goes_on_from_its_last_whole_checkpoint(models, damage):
    """Stopped, its newest checkpoint damaged: resumed it equals an undisturbed one, every process with half of it."""
    more, name = ("--total-episodes", 96, "--save-every", 1), f"sharded_{damage}"
    expected, _ = run(2, "drpo_fsdp.py", f"{name}_whole", models, *more)
    job, _ = start(2, name, models, *more, script="drpo_fsdp.py")
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=100)
    run_dir = models.folder / "runs" / name
    assert errors.count(f"to go on: --resume {name}") == 1 and len(read_metrics(run_dir)) < 6
    older, newest = sorted(run_dir.glob("checkpoint_*"))
    kept = "".join((run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)[: int(older.name[11:])])
    parts = sorted(newest.glob("*.distcp"))
    sizes = [part.stat().st_size for part in parts]
    assert len(sizes) == 2 and max(sizes) < 1.1 * min(sizes)
    if damage == "part":
        parts[1].write_bytes(parts[1].read_bytes()[:-50] + bytes(50))
    else:
        (newest / "manifest.json").write_bytes((newest / "manifest.json").read_bytes()[:-9])
    launched = torchrun(2, ROOT / "drpo_fsdp.py", "--resume", name)
    done = subprocess.run(launched, cwd=models.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{newest.name} is damaged" in done.stdout
    assert read_metrics(run_dir) == expected and (run_dir / "metrics.jsonl").read_text().startswith(kept)
    weights = [(models.folder / f"out_{run}/model.safetensors").read_bytes() for run in (name, f"{name}_whole")]
    assert weights[0] == weights[1]
    done = run_script("drpo.py", "--resume", name, cwd=models.folder, check=False)
    assert done.returncode == 2 and "is a run of drpo_fsdp.py" in done.stderr


@pytest.mark.slow
def test_a_full_disk_ends_a_sharded_run_with_its_reason(models, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        command = (*flags_of("drpo_fsdp.py", models), "--run-name", "full", "--save-every", 1)
        launched = torchrun(2, ROOT / "drpo_fsdp.py", *command)
        done = subprocess.run(launched, cwd=disk, capture_output=True, text=True)
        assert done.returncode != 0
        assert "error: cannot write" in done.stderr and "CheckpointException" not in done.stderr
        whole = list((disk / "runs/full").glob("checkpoint_*"))
        assert len(whole) == 2 and all((path / "manifest.json").exists() for path in whole)
    finally:
        subprocess.run(["umount", disk], check=True)
