"""torchrun with two processes and more, sharded or not: the same rollouts, the same numbers to rounding, no hang."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, random_model, read_metrics, read_rows, run_here
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import drpo
from plumbing.processes import in_chunks
from plumbing.tokens import pad

TOY = ROOT / "tests/toy.py"
TWO_AND_MORE = [2, pytest.param(3, marks=pytest.mark.slow)]


def torchrun(processes, *command):
    return launcher("--standalone", "--nproc-per-node", processes, *command)


def launcher(*command):
    return [sys.executable, "-m", "torch.distributed.run", *(str(part) for part in command)]


def launch(processes, script, *flags, cwd):
    """-> what the processes said, once they are done."""
    done = subprocess.run(torchrun(processes, ROOT / script, *flags), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


# the functions of plumbing/processes.py, on tensors that show where they come from
WORKER = """
import os
import sys
import time
from types import SimpleNamespace

import torch

sys.path[:0] = sys.argv[1:3]
import conftest
import drpo
from plumbing.processes import *

folder, found = sys.argv[3], {}
args = SimpleNamespace(process_timeout=60, dtype="float32")
try:
    start_processes(args, batch_size=12, minibatch_size=7)
except SystemExit as end:
    found["refused"] = end.code
print("one line a process")

if rank() == 0:  # the others must wait until it is there
    time.sleep(0.5)
    open(f"{folder}/written", "w").close()
barrier()
found["waited"] = os.path.exists(f"{folder}/written")

rows, other, first, second, context = torch.load(f"{folder}/in.pt")
def marks(model, rows, other, scale):
    assert not torch.is_grad_enabled()
    given.append(rows)
    return model + scale * rows + other.sum(1)

given = []
found["chunks"] = in_chunks(marks, 0.5, 3, rows, other, lengths=(first, second), scale=2.0)
found["given"], given = given, []
found["one"] = in_chunks(marks, 0.5, 3, rows[:1], other[:1], lengths=first[:1], scale=2.0)
sizes = []
part = lambda part: sizes.append(len(part)) or in_chunks(marks, 0.5, 3, part, other[part], lengths=part, scale=2.0)
found["parts"] = in_parts(part, rows, 2, "title")
found["list"] = in_parts(lambda part: [f"row {row}" for row in part.tolist()], rows, 2, "title")
found["sizes"] = sizes
found["micro"] = micro_batches(rows[:12].flip(0), first, 2)

torch.manual_seed(1)
model = torch.nn.Linear(2, 3).double()
parameters = dict(model.named_parameters()) | {"unused": torch.nn.Parameter(torch.ones(2))}
sums = {"loss": 0.0, "rows": 0}
for micro in micro_batches(rows[:12], first, 2):
    loss = model(other[micro].double()).square().sum()
    loss.backward()
    sums["loss"] += loss.item()
    sums["rows"] += len(micro)
sum_over_processes(sums, parameters)
found["sums"], found["gradients"] = sums, {name: p.grad for name, p in parameters.items()}
found["norm"] = gradient_norm(parameters)

policy, lengths = conftest.random_model(conftest.AutoModelForCausalLM, 0), context[1].sum(1)
for name, count in (("rollouts", 13), ("first", 1)):
    part = [tensor[:count] for tensor in context]
    found[name] = in_chunks(drpo.generate, policy, 3, *part, lengths=lengths[:count], eos=0, temperature=0.9)
torch.save(found, f"{folder}/out.{rank()}")
go_on_alone()
print("rank", rank(), "of", world(), file=sys.stderr)
"""


@pytest.fixture(scope="module", params=TWO_AND_MORE)
def worker(request, tmp_path_factory):
    """What a few processes found, in one launch, and what they were given."""
    folder, rng = tmp_path_factory.mktemp("worker"), torch.Generator().manual_seed(4)
    prompts = [torch.randint(2, 1024, (n,), generator=rng).tolist() for n in range(1, 14)]
    context = (*pad(prompts, "left", "cpu"), torch.rand(13, 12, generator=rng))
    context += (torch.randint(1, 12, (13,), generator=rng),)  # the budget
    first, second = torch.randint(0, 3, (13,), generator=rng), torch.randint(0, 9, (13,), generator=rng)
    given = (torch.arange(13), torch.randn(13, 2, generator=rng), first, second, context)
    torch.save(given, folder / "in.pt")
    (folder / "worker.py").write_text(WORKER)
    done = launch(request.param, folder / "worker.py", ROOT, ROOT / "tests", folder, cwd=folder)
    found = [torch.load(folder / f"out.{rank}") for rank in range(request.param)]
    return SimpleNamespace(given=given, found=found, done=done, processes=request.param)


def test_the_processes_start_and_wait(worker):
    assert [found["refused"] for found in worker.found] == [2] * worker.processes
    assert f"--minibatch-size 7 must be a multiple of the {worker.processes} processes" in worker.done.stderr
    assert worker.done.stdout.count("one line a process") == 1  # rank 0 alone speaks
    assert all(found["waited"] for found in worker.found)
    assert worker.done.stderr.count("rank 0 of 1") == 1  # the others have ended


def test_everyone_has_everything_in_order(worker):
    rows, other, *_ = worker.given
    expected = 0.5 + 2.0 * rows + other.sum(1)
    for found in worker.found:
        assert_close([found["chunks"], found["one"]], [expected, expected[:1]])
        assert_close(found["parts"], expected)
        assert found["list"] == [f"row {row}" for row in range(13)]


def test_the_work_is_shared_and_like_lengths_are_together(worker):
    rows, _, first, second, _ = worker.given
    shares = [torch.cat(found["given"]).tolist() for found in worker.found]
    assert {len(share) for share in shares} == {-(-13 // worker.processes)}
    assert {row for share in shares for row in share} == set(rows.tolist())
    for share, found in zip(shares, worker.found):
        pairs = [(first[row].item(), second[row].item()) for row in share]
        pairs = pairs[:-1]  # the last may be a filler
        assert pairs == sorted(pairs) and {len(part) for part in found["given"][:-1]} == {3}
        whole, rest = divmod(13, 2 * worker.processes)
        assert found["sizes"] == [2 * worker.processes] * whole + [rest]
    micro = [torch.cat(found["micro"]) for found in worker.found]
    assert sorted(torch.cat(micro).tolist()) == list(range(12)) and {len(x) for x in micro} == {12 // worker.processes}
    assert all(len(part) == 2 for found in worker.found for part in found["micro"])
    assert all(first[x].equal(first[x].sort()[0]) for x in micro)


def test_sums_gradients_and_their_norm(worker):
    other = worker.given[1]
    torch.manual_seed(1)
    model = torch.nn.Linear(2, 3).double()
    loss = model(other[:12].double()).square().sum()
    loss.backward()
    gradients = {"weight": model.weight.grad, "bias": model.bias.grad}
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    for found in worker.found:
        assert found["sums"] == {"loss": pytest.approx(loss.item()), "rows": 12}
        assert found["gradients"].pop("unused") is None
        assert_close(found["gradients"], gradients)
        assert_close(found["norm"], norm)


def test_rollouts_token_for_token(worker):
    context = worker.given[-1]
    policy = random_model(AutoModelForCausalLM, 0)
    expected = in_chunks(drpo.generate, policy, 13, *context, lengths=context[1].sum(1), eos=0, temperature=0.9)
    assert len(set(map(tuple, expected.tolist()))) > 10  # rows differ, so an order mixed up would show
    for found in worker.found:
        assert_close(found["rollouts"], expected)
        assert_close(found["first"], expected[:1])


# the scripts
PAIRS = ("--num-epochs", 1, "--batch-size", 32, "--micro-batch-size", 8)
STEPS = ("--total-episodes", 48, "--batch-size", 16, "--minibatch-size", 8, "--micro-batch-size", 4)
STEPS += ("--eval-every", 2, "--eval-rows", 7, "--num-ppo-epochs", 2)
STEPS += ("--seed", 2)  # one in which rounding tips no sampled token over: of a run's 1,200 one in 15,000 does
SHARD = ("--shard", "--gradient-checkpointing")  # hooks within hooks
ONLINE = ("online_dpo.py", "xpo.py", "rejection_sampling.py")
OTHERS = ("sft.py", "reward_model.py", "dpo.py", "dpo_ln.py", "ppo.py", "rto.py", *ONLINE)
SLOW = [("drpo.py", 4, ()), *((script, 2, flags) for script in OTHERS for flags in ((), SHARD))]
COUNTS = [("drpo.py", 2, ()), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
ROUNDS = ("--total-episodes", 48, "--prompts-per-round", 8, "--samples-per-prompt", 3, "--updates-per-round", 2)
ROUNDS += ("--batch-size", 10, "--micro-batch-size", 4, "--eval-every", 2, "--eval-rows", 7)
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
REJECTION += ("--batch-size", 16, "--micro-batch-size", 4, "--eval-every", 2, "--eval-rows", 7)


def flags_of(script, models):
    if script in models.rl:
        return (*models.rl[script], *STEPS)
    if script == "rejection_sampling.py":
        return (*models.flags, *REJECTION)
    if script in ONLINE:
        return (*models.flags, *ROUNDS, *(("--alpha", 0.1, "--second-reference") if script == "xpo.py" else ()))
    if script == "sft.py":
        return ("--dataset", models.reference, "--base-model", ROOT / "data/tiny_pythia", *PAIRS)
    more = ("--reference-dataset", models.reference) if script == "reward_model.py" else ("--eval-every", 3)
    return ("--dataset", models.preference, "--sft-path", models.sft, *PAIRS, *more)


@pytest.fixture(scope="module")
def alone(models):
    """script -> folder with its run by one process, made when asked for."""
    made = {}

    def run(script):
        if script not in made:
            made[script] = models.folder / f"alone_{script[:-3]}"
            made[script].mkdir()
            flags = (*flags_of(script, models), "--run-name", "run", "--output-dir", "out")
            done = run_here(script, *flags, cwd=made[script])
            assert done.stdout.count("metrics, arguments") == 1
        return made[script]

    return run


def assert_same_to_rounding(script, folder, expected):
    """Metrics and final weights in runs/run and out of two folders."""
    found, wanted = (read_metrics(path / "runs/run") for path in (folder, expected))
    assert len(found) == len(wanted) > 2
    for ours, theirs in zip(found, wanted):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if key == "accuracy" and ours["update"] == 1 and script != "reward_model.py":
                continue  # both policies are the reference: margins are 0 up to rounding, and so is their sign
            assert ours[key] == pytest.approx(value, rel=2e-3, abs=2e-4), (ours["update"], key)
    for key in ("response/length", "reset/length", "reset/fraction"):  # the same rollouts
        assert [line.get(key) for line in found] == [line.get(key) for line in wanted]
    weights, others = (load_file(path / "out/model.safetensors") for path in (folder, expected))
    assert weights.keys() == others.keys()
    for key, tensor in weights.items():
        assert_close(tensor, others[key], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("script, processes, flags", COUNTS)
def test_the_number_of_processes_changes_rounding_alone(script, processes, flags, models, alone, tmp_path):
    flags = (*flags_of(script, models), *flags, "--run-name", "run", "--output-dir", "out")
    done = launch(processes, script, *flags, cwd=tmp_path)
    assert done.stdout.count("metrics, arguments") == 1
    assert_same_to_rounding(script, tmp_path, alone(script))


def checkpoints(run_dir):
    """Update -> file."""
    return {int(path.name[11:19]): path for path in sorted(run_dir.glob("checkpoint_*.pt"))}


def go_back(run_dir, update):
    """As if the process had been killed some updates after that checkpoint; -> lines of metrics.jsonl to be kept."""
    for number, path in checkpoints(run_dir).items():
        if number > update:
            path.unlink()
    return "".join((run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)[:update])


def shapes(value):
    """Of all tensors in a checkpoint, under their names."""
    if isinstance(value, dict):
        return {key: shapes(x) for key, x in value.items()}
    return (type(value), value.dtype, value.device, value.shape) if torch.is_tensor(value) else type(value)


@pytest.mark.slow
def test_sharded_then_alone_then_sharded_again(models, alone, tmp_path):
    """Each compared with a run that one process made: the whole sharded one, and those that go on from its checkpoints."""
    expected, run_dir = alone("drpo.py"), tmp_path / "runs/run"
    flags = (*flags_of("drpo.py", models), "--run-name", "run", "--output-dir", "out", "--save-every", 1)
    done = launch(2, "drpo.py", *flags, *SHARD, "--keep-checkpoints", 9, cwd=tmp_path)
    assert done.stdout.count("metrics, arguments") == 1
    assert_same_to_rounding("drpo.py", tmp_path, expected)
    saved, plain = (torch.load(checkpoints(path / "runs/run")[3]) for path in (tmp_path, expected))
    assert shapes(saved) == shapes(plain)
    steps = [
        lambda: run_here("drpo.py", "--resume", "run", "--no-shard", cwd=tmp_path),
        lambda: launch(2, "drpo.py", "--resume", "run", "--shard", cwd=tmp_path),
    ]
    for update, go_on in enumerate(steps, 1):
        kept = go_back(run_dir, update)
        shutil.rmtree(tmp_path / "out")
        go_on()
        assert (run_dir / "metrics.jsonl").read_text().startswith(kept) and kept.count("\n") == update
        assert_same_to_rounding("drpo.py", tmp_path, expected)


@pytest.mark.parametrize(
    "name, value", [("WORLD_SIZE", None), ("MASTER_ADDR", None), ("RANK", ""), ("WORLD_SIZE", "x")]
)
def test_half_of_torchrun_is_one_line(name, value, tmp_path, monkeypatch):
    given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"} | {name: value}
    for variable, content in given.items():
        monkeypatch.setenv(variable, content) if content is not None else monkeypatch.delenv(variable, raising=False)
    done = run_here(TOY, cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: $RANK is set, as by torchrun, but")
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_what_sharding_needs(tmp_path, monkeypatch):
    for script in ("drpo.py", *OTHERS):
        done = run_here(script, "--shard", cwd=tmp_path, check=False)
        assert done.returncode == 2 and "--shard runs under torchrun" in done.stderr
    monkeypatch.setenv("RANK", "0")
    done = run_here("drpo.py", "--shard", "--lora-rank", 4, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "without --lora-rank" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("processes", (2, 4))
def test_completions_do_not_depend_on_the_number_of_processes(processes, models):
    """judge.py: as many rows as leave the last batch incomplete, and one table, from the same completions."""
    files, tables = [], []
    for count in (1, processes):
        name = f"judge_{processes}_{count}"
        command = [*models.flags, "--policies", models.sft, "--split", "train", "--num-prompts", 45]
        command += ["--judge", "rubric", "--micro-batch-size", 8, "--cache-dir", name, "--run-name", name]
        start = run_here if count == 1 else lambda *command, cwd: launch(processes, *command, cwd=cwd)
        done = start("judge.py", *command, cwd=models.folder)
        (file,) = (models.folder / name).glob("*.jsonl")
        files.append(read_rows(file))
        tables.append(done.stdout[done.stdout.index("win rate") :].replace(name, ""))
    alone, shared = files
    assert len(alone) == len(shared) == 45 and len({line["completion"] for line in alone}) > 10
    for ours, theirs in zip(shared, alone):
        assert ours.pop("kl") == pytest.approx(theirs.pop("kl"), rel=1e-4, abs=1e-4)
        assert ours == theirs
    assert tables[0] == tables[1]


# jobs of the toy that end before they are done
def start(processes, cwd, *flags):
    """Processes under way, with two updates behind them; -> torchrun, worker pids by rank."""
    launched = torchrun(processes, TOY, "--run-name", "run", "--wait", 0.3, *flags)
    job = subprocess.Popen(launched, cwd=cwd, stderr=subprocess.PIPE, text=True, start_new_session=True)
    path = cwd / "runs/run/metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") > 1):
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.05)
    ranks = {}
    for pid in map(int, Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()):
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        ranks |= {int(entry[5:]): pid for entry in environment if entry.startswith("RANK=")}
    assert sorted(ranks) == list(range(processes))
    return job, ranks


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_dead_process_ends_the_job(rank, tmp_path):
    job, ranks = start(2, tmp_path, "--num-epochs", 1000)
    os.kill(ranks[rank], signal.SIGKILL)
    _, errors = job.communicate()
    assert job.returncode != 0 and "Signal 9 (SIGKILL)" in errors


@pytest.mark.slow
def test_a_stalled_process_ends_the_job(tmp_path):
    job, ranks = start(2, tmp_path, "--num-epochs", 1000, "--process-timeout", 5)
    os.kill(ranks[1], signal.SIGSTOP)
    _, errors = job.communicate()
    assert job.returncode != 0 and "Timed out" in errors


def assert_close_metrics(found, expected):
    found, expected = read_metrics(found), read_metrics(expected)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for ours, theirs in zip(found, expected):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--shard",)])
def test_a_stopped_job_goes_on_alone(flags, tmp_path):
    job, _ = start(2, tmp_path, *flags)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate()
    run_dir = tmp_path / "runs/run"
    kept, done = (run_dir / "metrics.jsonl").read_text(), len(read_metrics(run_dir))
    assert job.returncode != 0 and 2 <= done < 8 and list(checkpoints(run_dir)) == [done]
    assert errors.count(f"stopped after update {done} of 8; to go on: --resume run") == 1
    run_here(TOY, "--resume", "run", "--no-shard", cwd=tmp_path)
    assert (run_dir / "metrics.jsonl").read_text().startswith(kept)
    run_here(TOY, "--run-name", "whole", cwd=tmp_path)
    assert_close_metrics(run_dir, tmp_path / "runs/whole")


@pytest.mark.slow
def test_two_machines_share_a_job(tmp_path):
    """Two launchers on this one. The run has no name, so its folder is named after the time: the same for both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ("--nnodes", 2, "--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", port)
    jobs = []
    for number in range(2):
        command = launcher(*flags, "--node-rank", number, TOY, "--shard")
        jobs.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [job.communicate() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert [out.count("metrics, arguments") for out, _ in said] == [1, 0]
    (run_dir,) = (tmp_path / "runs").glob("toy__*")
    run_here(TOY, "--run-name", "whole", cwd=tmp_path)
    assert_close_metrics(run_dir, tmp_path / "runs/whole")


@pytest.mark.slow
def test_a_sharded_run_passes_over_a_damaged_checkpoint(tmp_path):
    flags = ("--run-name", "run", "--save-every", 1, "--keep-checkpoints", 9, "--shard")
    launch(2, TOY, *flags, cwd=tmp_path)
    run_dir = tmp_path / "runs/run"
    kept, newest = go_back(run_dir, 5), checkpoints(run_dir)[5]
    newest.write_bytes(newest.read_bytes()[:-50] + bytes(50))
    done = launch(2, TOY, "--resume", "run", cwd=tmp_path)
    assert done.stdout.count(f"{newest.name} is damaged") == 1 and (run_dir / f"{newest.name}.damaged").exists()
    kept = "".join(kept.splitlines(keepends=True)[:4])
    assert (run_dir / "metrics.jsonl").read_text().startswith(kept)
    launch(2, TOY, "--run-name", "whole", "--shard", cwd=tmp_path)
    assert read_metrics(run_dir) == read_metrics(tmp_path / "runs/whole")  # bit for bit
    saved, whole = (torch.load(checkpoints(tmp_path / "runs" / name)[8]) for name in ("run", "whole"))
    assert_close(saved["parameters"], whole["parameters"], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--shard",)])
def test_nan_ends_a_job(flags, tmp_path):
    command = torchrun(2, TOY, "--run-name", "run", "--nan-at", 3, "--save-every", 1, *flags)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "error: update 3: not finite: errors; rows 5 of --train-split" in done.stderr
    assert list(checkpoints(tmp_path / "runs/run")) == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--shard",)])
def test_a_full_disk_ends_a_job_with_its_reason(flags, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        command = torchrun(2, TOY, "--run-name", "run", "--save-every", 1, "--width", 500, *flags)
        done = subprocess.run(command, cwd=disk, capture_output=True, text=True)
        assert done.returncode != 0
        assert "error: cannot write" in done.stderr and "No space left" in done.stderr
        assert sorted(checkpoints(disk / "runs/run")) == [1, 2] and not list(disk.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", disk], check=True)
