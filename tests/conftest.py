"""What the tests share: the environment, two random models, and a small chain of real runs (SFT, then reward model)."""

import gc
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

# before torch is imported; one thread on the CPU, because exact equality of two runs is asked for
os.environ |= {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402

torch.set_num_threads(1)


def run_script(name, *flags, cwd, check=True):
    """A script of the repository in its own process; -> CompletedProcess with .stdout and .stderr as text."""
    command = [sys.executable, str(ROOT / name), *(str(flag) for flag in flags)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{name} {flags} ended with {done.returncode}:\n{done.stderr[-3000:]}"
    return done


@contextmanager
def torch_as_it_was():
    """Undoes what a script sets for its whole process: autocast, and the state of the random generator."""
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
    generator = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_autocast_enabled("cpu", autocast[0])
        torch.set_autocast_dtype("cpu", autocast[1])
        torch.set_autocast_cache_enabled(autocast[2])
        torch.set_rng_state(generator)


@contextmanager
def signals_as_they_were():
    """A script takes Ctrl-C and SIGTERM for itself; pytest wants its own back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_here(name, *flags, cwd, check=True):
    """As run_script, in this process: about a second instead of five, and the same numbers (test_runs.py).

    name: of a script of the repository, or the path of another. -> .stdout, .stderr and .returncode. What the program
    prints past Python, such as the note after a signal, is not captured; an exception that it lets through comes here.
    """
    script, out, err = ModuleType("__main__"), io.StringIO(), io.StringIO()
    script.__file__ = str(ROOT / name)  # there and in the text below it tyro looks for what the flags mean
    command = [script.__file__, *(str(flag) for flag in flags)]
    code = None
    gc.freeze()  # what is there already need not be looked through below
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ), torch_as_it_was(), signals_as_they_were():
        patch.chdir(cwd)
        patch.setattr(sys, "argv", command)
        patch.setitem(sys.modules, "__main__", script)
        try:
            with redirect_stdout(out), redirect_stderr(err):
                exec(compile((ROOT / name).read_text(encoding="utf-8"), script.__file__, "exec"), vars(script))
        except SystemExit as end:
            code = end.code
        finally:
            vars(script).clear()  # caches hold on to Args and so to all of them; but locks and models must go now,
            gc.collect()  # as they would with a process
            gc.unfreeze()
    if isinstance(code, str):  # sys.exit of a message
        print(code, file=err)
        code = 1
    done = SimpleNamespace(args=command, stdout=out.getvalue(), stderr=err.getvalue(), returncode=code or 0)
    assert not check or done.returncode == 0, f"{name} {flags} ended with {code}:\n{done.stderr[-3000:]}"
    return done


def read_metrics(run_dir, start=1):
    """metrics.jsonl from an update on as a list of dicts, without the keys that hold times."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["update"] >= start]
    return [{key: x for key, x in line.items() if not key.startswith("time/")} for line in lines]


def read_rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def slow_for(names, scripts):
    """Parameters of a test: the same names, of which some run with -m slow only, as their parent covers most of them."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in names else name for name in scripts]


def write_dataset(folder, task, sizes=(8, 8, 8), edit=lambda rows: rows):
    """A folder with the first rows of each split of an embedded dataset, passed through `edit`."""
    folder.mkdir(parents=True)
    for split, size in zip(("train", "validation", "test"), sizes):
        rows = read_rows(ROOT / "data/tldr_mini" / task / f"{split}.jsonl")
        short = [row for row in rows if all(len(row.get(name, "").split()) <= 22 for name in ("chosen", "rejected"))]
        rows = edit(short[:size])  # no pair is left out for its length
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Small datasets, and an SFT and a reward model that the real scripts trained on them for a few steps.

    What stands for a DPO policy is the SFT policy with its weights moved at random, which takes no time.
    """
    folder = tmp_path_factory.mktemp("models")
    reference = write_dataset(folder / "reference", "reference", (256, 32, 32))
    preference = write_dataset(folder / "preference", "preference", (256, 32, 32))
    sft, reward = folder / "sft", folder / "reward"
    steps = ("--num-epochs", 2, "--batch-size", 16)
    sft_run = run_script(
        *("sft.py", "--dataset", reference, "--base-model", ROOT / "data/tiny_pythia", "--output-dir", sft),
        *("--learning-rate", 4e-3),
        *("--run-name", "sft", *steps),
        cwd=folder,
    )
    reward_run = run_script(
        *("reward_model.py", "--dataset", preference, "--reference-dataset", reference, "--sft-path", sft),
        *("--output-dir", reward, "--run-name", "reward", *steps),
        cwd=folder,
    )
    dpo, moved, noise = folder / "dpo", AutoModelForCausalLM.from_pretrained(sft), torch.Generator().manual_seed(5)
    for tensor in moved.parameters():
        tensor.data += 0.1 * tensor.std() * torch.randn(tensor.shape, generator=noise)
    moved.save_pretrained(dpo)
    AutoTokenizer.from_pretrained(sft).save_pretrained(dpo)
    flags = ("--dataset", reference, "--sft-path", sft, "--reward-path", reward)  # what an RL script needs
    return SimpleNamespace(
        folder=folder,
        reference=reference,
        preference=preference,
        sft=sft,
        reward=reward,
        dpo=dpo,
        flags=flags,
        rl={"ppo.py": flags, "drpo.py": flags, "rto.py": (*flags, "--dpo-path", dpo)},
        steps=steps,
        sft_run=sft_run,
        reward_run=reward_run,
    )


def random_model(auto_class, seed, **settings):
    """Random weights under the tiny config, in float64: a batch and a single row then agree far below float32."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(ROOT / "data/tiny_pythia")
    for name, value in settings.items():
        setattr(config, name, value)
    return auto_class.from_config(config).double().eval()


@pytest.fixture
def policy():
    return random_model(AutoModelForCausalLM, 0)


@pytest.fixture
def critic():
    return random_model(AutoModelForSequenceClassification, 1, num_labels=1, score_mean=0.7)
