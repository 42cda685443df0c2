"""Bad input: one line that names what is wrong, exit code 2, nothing written.

What plumbing/ checks is tested once, in test_flags, test_rows and test_models. Here it is that every script asks plumbing,
and what a script checks itself: in this process, so that torch is imported once, and by one real launch of each script.
"""

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import ROOT, random_model, read_metrics, run_here, run_script, slow_for, write_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from plumbing import new_folder, try_folder, write_text, writing

BASE = ROOT / "data/tiny_pythia"
RL = ("ppo.py", "drpo.py", "rto.py", "online_dpo.py", "xpo.py", "rejection_sampling.py")
TRAINING = (*RL, "sft.py", "reward_model.py", "dpo.py", "dpo_ln.py")


def assert_error(code, stderr, culprit):
    assert code == 2 and "Traceback" not in stderr
    (line,) = (line for line in stderr.splitlines() if line.startswith("error:"))
    assert culprit in line


def fails(capsys, culprit, function, *args, **kwargs):
    """function(...) ends the program with one error line that holds `culprit`; -> what it printed, as .out and .err."""
    capsys.readouterr()  # what was printed before
    with pytest.raises(SystemExit) as ended:
        function(*args, **kwargs)
    printed = capsys.readouterr()
    assert_error(ended.value.code, printed.err, culprit)
    return printed


def script_fails(culprit, script, *flags, cwd):
    """The same of a script, in this process."""
    done = run_here(script, *flags, cwd=cwd, check=False)
    assert_error(done.returncode, done.stderr, culprit)


def save_random(folder, auto_class, **settings):
    """A model with random weights under the tiny config, and the tiny tokenizer, in a folder; -> the folder."""
    random_model(auto_class, 0, **settings).float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A few rows and untrained models: with them every script comes as far as its first update."""
    folder = tmp_path_factory.mktemp("given")
    return SimpleNamespace(
        reference=write_dataset(folder / "reference", "reference"),
        preference=write_dataset(folder / "preference", "preference"),
        sft=save_random(folder / "sft", AutoModelForCausalLM),
        reward=save_random(folder / "reward", AutoModelForSequenceClassification, num_labels=1),
    )


def data_flags(script, given):
    if script == "reward_model.py":
        return "--dataset", given.preference, "--reference-dataset", given.reference
    if script in ("dpo.py", "dpo_ln.py"):
        return "--dataset", given.preference, "--batch-size", 8
    return "--dataset", given.reference


def good_flags(script, given):
    models = ("--sft-path", given.sft)
    if script == "sft.py":
        models = ("--base-model", BASE, "--num-epochs", 2)
    elif script in RL:
        models += ("--reward-path", given.reward)
    if script == "rto.py":
        models += ("--dpo-path", given.sft)
    return *data_flags(script, given), *models


# what a case changes: a function of (given, folder) -> flags that override the good ones
def flags(*values):
    return lambda given, folder: values


def dataset(task, edit):
    return lambda given, folder: ("--dataset", write_dataset(folder / "dataset", task, edit=edit))


def pairs_without(column):
    return lambda given, folder: (
        "--preference-dataset",
        write_dataset(folder / "pairs", "preference", edit=without(column)),
    )


def hybrid(*more):
    return lambda given, folder: ("--preference-dataset", given.preference, *more)


def without(column):
    return lambda rows: [{key: x for key, x in row.items() if key != column} for row in rows]


def put(column, value):
    return lambda rows: [row | {column: value} for row in rows]


def other_vocabulary(given, folder, kind="reward"):
    shutil.copytree(getattr(given, kind), folder / f"other_{kind}")
    tokenizer = AutoTokenizer.from_pretrained(given.reward)
    tokenizer.add_tokens(["unheardof"])
    tokenizer.save_pretrained(folder / f"other_{kind}")
    return "--dpo-path" if kind == "sft" else "--reward-path", folder / f"other_{kind}"


def two_outputs(given, folder):
    return "--reward-path", save_random(folder / "two", AutoModelForSequenceClassification, num_labels=2)


def without_weights(flag):
    return lambda given, folder: (flag, shutil.copytree(BASE, folder / "empty"))


def small_embedding(given, folder):
    shutil.copytree(BASE, folder / "small")
    config = json.loads((BASE / "config.json").read_text())
    (folder / "small/config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    return "--base-model", folder / "small"


def no_eos(given, folder):
    shutil.copytree(BASE, folder / "endless")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder / "endless")
    return "--base-model", folder / "endless"


NUMBER, OBJECT = put("completion", 3), put("chosen", {"a": 1})
TOO_FEW, NO_DIVISOR = ("--total-episodes", 63, "--batch-size", 64), ("--batch-size", 8, "--minibatch-size", 3)
NO_LAYER = ("--lora-rank", 2, "--lora-target", "nowhere")
# script, what changes, text that the error must hold
CASES = [
    # what the scripts check themselves
    ("ppo.py", flags(*TOO_FEW), "--total-episodes"),
    ("ppo.py", flags(*NO_DIVISOR), "--minibatch-size must divide"),
    ("drpo.py", flags(*TOO_FEW), "--total-episodes"),
    ("drpo.py", flags(*NO_DIVISOR), "--minibatch-size must divide"),
    ("drpo.py", flags("--beta", 1.5), "--beta 1.5"),
    ("drpo.py", flags("--beta", -0.1), "--beta -0.1"),
    ("rto.py", flags("--beta1", -0.1), "--beta1 -0.1"),
    ("rto.py", flags("--token-reward-clip", 0), "--token-reward-clip 0"),
    ("rto.py", flags("--dpo-path", "models/dpo"), "--sft-path needs --dpo-path"),
    ("sft.py", flags("--num-epochs", 2, "--batch-size", 17), "the 16 rows of all epochs do not fill --batch-size 17"),
    (
        "reward_model.py",
        flags("--num-epochs", 2, "--batch-size", 17),
        "the 16 rows of all epochs do not fill --batch-size 17",
    ),
    ("dpo.py", flags("--batch-size", 9), "the 8 rows of all epochs do not fill --batch-size 9"),
    ("online_dpo.py", flags("--samples-per-prompt", 1), "--samples-per-prompt must be at least 2"),
    ("online_dpo.py", flags("--total-episodes", 0), "--total-episodes at least"),
    ("online_dpo.py", flags("--total-episodes", 31, "--prompts-per-round", 8, "--samples-per-prompt", 4), "at least"),
    ("online_dpo.py", hybrid("--total-episodes", 31), "--total-episodes at least"),
    ("xpo.py", flags("--total-episodes", 0), "--total-episodes at least"),
    ("rejection_sampling.py", flags("--samples-per-prompt", 1), "--samples-per-prompt must be at least 2"),
    # the columns they ask for
    ("ppo.py", dataset("reference", without("completion")), "'completion'"),
    ("ppo.py", dataset("reference", NUMBER), "column 'completion'"),
    ("drpo.py", dataset("reference", without("prompt")), "'prompt'"),
    ("rejection_sampling.py", dataset("reference", without("completion")), "'completion'"),
    ("drpo.py", flags("--reset-column", "draft"), "'draft'"),
    ("sft.py", dataset("reference", without("prompt")), "'prompt'"),
    ("sft.py", dataset("reference", NUMBER), "column 'completion'"),
    ("reward_model.py", dataset("preference", without("rejected")), "'rejected'"),
    ("reward_model.py", dataset("preference", OBJECT), "column 'chosen'"),
    ("dpo.py", dataset("preference", without("rejected")), "'rejected'"),
    ("dpo.py", dataset("preference", OBJECT), "column 'chosen'"),
    ("dpo_ln.py", dataset("preference", without("rejected")), "'rejected'"),
    ("online_dpo.py", dataset("reference", without("prompt")), "'prompt'"),
    ("online_dpo.py", pairs_without("rejected"), "'rejected'"),
    # every flag that names data
    ("ppo.py", flags("--dataset", "no/such"), "no/such"),
    ("ppo.py", flags("--train-split", "nowhere"), "'nowhere'"),
    ("ppo.py", flags("--validation-split", "nowhere"), "'nowhere'"),
    ("ppo.py", flags("--eval-split", "nowhere"), "'nowhere'"),
    ("drpo.py", flags("--dataset", "no/such"), "no/such"),
    ("drpo.py", flags("--train-split", "nowhere"), "'nowhere'"),
    ("drpo.py", flags("--validation-split", "nowhere"), "'nowhere'"),
    ("drpo.py", flags("--eval-split", "nowhere"), "'nowhere'"),
    ("rejection_sampling.py", flags("--eval-split", "nowhere"), "'nowhere'"),
    ("sft.py", flags("--dataset", "no/such"), "no/such"),
    ("sft.py", flags("--train-split", "nowhere"), "'nowhere'"),
    ("sft.py", flags("--validation-split", "nowhere"), "'nowhere'"),
    ("reward_model.py", flags("--dataset", "no/such"), "no/such"),
    ("reward_model.py", flags("--reference-dataset", "no/such"), "no/such"),
    ("reward_model.py", flags("--train-split", "nowhere"), "'nowhere'"),
    ("reward_model.py", flags("--eval-split", "nowhere"), "'nowhere'"),
    ("dpo.py", flags("--dataset", "no/such"), "no/such"),
    ("dpo_ln.py", flags("--dataset", "no/such"), "no/such"),
    ("dpo.py", flags("--train-split", "nowhere"), "'nowhere'"),
    ("dpo.py", flags("--validation-split", "nowhere"), "'nowhere'"),
    ("online_dpo.py", flags("--dataset", "no/such"), "no/such"),
    ("online_dpo.py", flags("--preference-dataset", "no/such"), "no/such"),
    ("online_dpo.py", flags("--eval-split", "nowhere"), "'nowhere'"),
    # every flag that names a model
    ("online_dpo.py", flags("--sft-path", "/no/such/sft"), "/no/such/sft"),
    ("online_dpo.py", flags("--reward-path", "no/such/reward"), "no/such/reward"),
    ("ppo.py", flags("--sft-path", "/no/such/sft"), "/no/such/sft"),
    ("ppo.py", flags("--reward-path", "/no/such/reward"), "/no/such/reward"),
    ("drpo.py", flags("--sft-path", "no/such/sft"), "no/such/sft"),
    ("drpo.py", flags("--reward-path", "no/such/reward"), "no/such/reward"),
    ("rto.py", flags("--dpo-path", "no/such/dpo"), "no/such/dpo"),
    ("rejection_sampling.py", flags("--reward-path", "no/such/reward"), "no/such/reward"),
    ("sft.py", flags("--base-model", "/no/such/base"), "/no/such/base"),
    ("reward_model.py", flags("--sft-path", "/no/such/sft"), "/no/such/sft"),
    ("dpo.py", flags("--sft-path", "/no/such/sft"), "/no/such/sft"),
    # what a model is needed for
    ("ppo.py", two_outputs, "is no reward model"),
    ("drpo.py", two_outputs, "is no reward model"),
    ("ppo.py", other_vocabulary, "other_reward has another vocabulary than"),
    ("drpo.py", other_vocabulary, "other_reward has another vocabulary than"),
    ("rto.py", partial(other_vocabulary, kind="sft"), "other_sft has another vocabulary than"),
    ("rto.py", lambda given, folder: ("--dpo-path", given.reward), "lacks "),
    ("ppo.py", without_weights("--sft-path"), "safetensors"),
    ("drpo.py", without_weights("--sft-path"), "safetensors"),
    ("rto.py", without_weights("--dpo-path"), "safetensors"),
    ("reward_model.py", without_weights("--sft-path"), "safetensors"),
    ("dpo.py", without_weights("--sft-path"), "safetensors"),
    ("ppo.py", flags("--prompt-length", 500), "512 positions"),
    ("drpo.py", flags("--prompt-length", 500), "512 positions"),
    ("sft.py", flags("--response-length", 500), "512 positions"),
    ("reward_model.py", flags("--response-length", 500), "512 positions"),
    ("dpo.py", flags("--response-length", 500), "512 positions"),
    ("sft.py", small_embedding, "the embedding has 500 rows"),
    ("sft.py", no_eos, "has no EOS token"),
    *((script, flags(*NO_LAYER), "--lora-target nowhere") for script in TRAINING),
]


@pytest.mark.parametrize("script, change, culprit", CASES, ids=[f"{case[0]}: {case[2]}" for case in CASES])
def test_bad_input_is_one_line(script, change, culprit, given, tmp_path):
    command = (*good_flags(script, given), *change(given, tmp_path))
    before = sorted(tmp_path.rglob("*"))
    script_fails(culprit, script, *command, cwd=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before  # no runs/, no models/


LAUNCHES = {
    "ppo.py": ("--temperature", 0),
    "drpo.py": ("--beta", 1.5),
    "rto.py": ("--beta1", -0.1),
    "sft.py": ("--base-model", "/no/such/base"),
    "reward_model.py": ("--eval-split", "nowhere"),
    "dpo.py": ("--sft-path", "/no/such/sft"),
    "dpo_ln.py": ("--sft-path", "/no/such/sft"),
    "expo.py": ("--aligned-path", "/no/such/dpo"),
    "online_dpo.py": ("--temperature", 0),
    "xpo.py": ("--alpha", -1),
    "rejection_sampling.py": ("--eta", -3.5),
    "judge.py": ("--split", "nowhere"),
}


@pytest.mark.parametrize(
    "script", slow_for({*LAUNCHES} - {"sft.py", "drpo.py", "rejection_sampling.py", "judge.py"}, LAUNCHES)
)
def test_a_real_launch_ends_with_code_2(script, tmp_path):
    flag, value = LAUNCHES[script]
    done = run_script(script, flag, value, cwd=tmp_path, check=False)
    assert_error(done.returncode, done.stderr, str(value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", TRAINING)
def test_an_existing_run_is_not_touched(script, given, tmp_path):
    file = tmp_path / "runs" / "taken" / "metrics.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("kept\n")
    script_fails("--run-name taken", script, *good_flags(script, given), "--run-name", "taken", cwd=tmp_path)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "runs", file.parent, file] and file.read_text() == "kept\n"


def test_a_batch_may_be_larger_than_the_train_split(given, tmp_path):
    sizes = ("--batch-size", 12, "--micro-batch-size", 5, "--num-epochs", 3)  # two updates from three times 8 rows
    done = run_here("sft.py", *good_flags("sft.py", given), *sizes, "--run-name", "large", cwd=tmp_path)
    assert [line["update"] for line in read_metrics(tmp_path / "runs/large")] == [1, 2]
    assert f"{BASE} holds no weights: initialising at random" in done.stdout  # the base model of the task


# training what is missing; subprocess.Popen, which would start it, only notes the script
@pytest.fixture
def started(monkeypatch, given):
    """Names of the scripts that were started; each leaves its model where it is by default."""
    names = []

    def popen(command, **kwargs):
        names.append(os.path.basename(command[1]))
        kind = {"sft.py": "sft", "reward_model.py": "reward", "dpo.py": "dpo"}[names[-1]]
        shutil.copytree(given.reward if kind == "reward" else given.sft, f"models/{kind}")
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(subprocess, "Popen", popen)
    return names


# script, what is wrong; the default checkpoints are missing, so that a late check would come after a training run
LATE = [
    ("ppo.py", flags("--sft-path", "no_sft"), "no_sft"),
    ("ppo.py", flags("--reward-path", "no_reward"), "no_reward"),
    ("ppo.py", dataset("reference", without("completion")), "'completion'"),
    ("drpo.py", flags("--sft-path", "no_sft"), "no_sft"),
    ("drpo.py", flags("--reward-path", "no_reward"), "no_reward"),
    ("drpo.py", dataset("reference", without("completion")), "'completion'"),
    ("rto.py", flags("--dpo-path", "no_dpo"), "no_dpo"),
    ("reward_model.py", dataset("preference", without("rejected")), "'rejected'"),
    ("reward_model.py", flags("--reference-dataset", "no/such"), "no/such"),
    ("dpo.py", dataset("preference", without("rejected")), "'rejected'"),
    ("online_dpo.py", pairs_without("rejected"), "'rejected'"),
    ("online_dpo.py", flags("--reward-path", "no_reward"), "no_reward"),
    ("rejection_sampling.py", flags("--reward-path", "no_reward"), "no_reward"),
]


@pytest.mark.parametrize("script, change, culprit", LATE, ids=[f"{case[0]}: {case[2]}" for case in LATE])
def test_nothing_is_trained_before_the_rest_is_checked(script, change, culprit, given, started, tmp_path):
    script_fails(culprit, script, *data_flags(script, given), *change(given, tmp_path), cwd=tmp_path)
    assert not started and not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    "script, expected",
    [
        ("ppo.py", ["sft.py", "reward_model.py"]),
        ("drpo.py", ["sft.py", "reward_model.py"]),
        ("rto.py", ["sft.py", "reward_model.py", "dpo.py"]),
        ("reward_model.py", ["sft.py"]),
        ("dpo.py", ["sft.py"]),
        ("dpo_ln.py", ["sft.py"]),
        ("online_dpo.py", ["sft.py", "reward_model.py"]),
        ("rejection_sampling.py", ["sft.py", "reward_model.py"]),
    ],
)
def test_the_defaults_are_trained_if_missing(script, expected, given, started, tmp_path):
    # a layer that is not there ends the script once it has loaded them
    script_fails("--lora-target nowhere", script, *data_flags(script, given), *NO_LAYER, cwd=tmp_path)
    assert started == expected


def test_expo_trains_both_of_its_policies(started, tmp_path):
    script_fails("models/dpo has the weights of --sft-path models/sft", "expo.py", cwd=tmp_path)  # so it is here
    assert started == ["sft.py", "dpo.py"]


# writing
def full_disk():
    raise OSError(28, "No space left on device")


def full_disk_for_torch():
    try:
        full_disk()
    except OSError:
        raise RuntimeError("enforce fail at inline_container.cc:863")  # noqa: B904, as torch.save does


def full_disk_for_rust():
    raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("body", [full_disk, full_disk_for_torch, full_disk_for_rust])
def test_what_cannot_be_written_is_one_line(body, tmp_path, capsys):
    path = tmp_path / "out.json"

    def write():
        with writing(path):
            (tmp_path / "out.json.tmp").write_text("half")
            body()

    printed = fails(capsys, f"cannot write {path}: ", write)
    assert "No space left on device" in printed.err
    assert not list(tmp_path.iterdir())


def test_a_bug_is_no_full_disk(tmp_path):
    for bug in (KeyError("loss"), RuntimeError("shapes differ"), TypeError("not serializable")):
        with pytest.raises(type(bug)) as raised, writing(tmp_path / "out.json"):
            raise bug
        assert raised.value is bug


def test_a_file_is_replaced_whole(tmp_path, capsys):
    path = tmp_path / "out.txt"
    write_text(path, "a longer text")
    write_text(path, "né")
    assert path.read_bytes() == "né".encode() and list(tmp_path.iterdir()) == [path]
    nowhere = path / "out.txt"  # in a file
    fails(capsys, f"cannot write {nowhere}: ", write_text, nowhere, "text")


# a folder
def fill(path, text="new", names=("config.json", "model.safetensors")):
    with new_folder(str(path)) as folder:
        for name in names:
            (Path(folder) / name).write_text(text)


def texts(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_was_in_a_folder_is_kept_in_a_numbered_one(tmp_path, capsys):
    out, new = tmp_path / "models/out", {"config.json": "new", "model.safetensors": "new"}
    fill(out)
    assert texts(out) == new and "keeping" not in capsys.readouterr().out
    left = {"abc.tmp/config.json": "half", "abc.tmp/model-00009.safetensors": "old shard"}  # of a save that was killed
    left |= {"lost+found/": None}  # of a disk whose mount point this is
    for name, text in left.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).mkdir(exist_ok=True) if text is None else (out / name).write_text(text)
    (out / "adapter").mkdir()
    (out / "adapter/weights").write_text("new")
    fill(out, "newer")
    assert f"keeping what was in {out} in {out}/1\n" in capsys.readouterr().out
    fill(out, "newest", ("config.json",))
    assert f"keeping what was in {out} in {out}/2\n" in capsys.readouterr().out
    kept = {f"1/{name}": text for name, text in (new | {"adapter/weights": "new"}).items()}
    kept |= {f"2/{name}": "newer" for name in new}
    assert texts(out) == {"config.json": "newest"} | kept | {name: text for name, text in left.items() if text}
    assert (out / "lost+found").is_dir() and len(list(tmp_path.rglob("*.tmp"))) == 1
    assert os.stat(out).st_mode & 0o777 == os.stat(ROOT / "data").st_mode & 0o777


def test_what_is_half_there_cannot_be_loaded(tmp_path, monkeypatch):
    """Killed between any two moves: there is never a config.json beside weights that are not its own."""
    real, seen = os.rename, []

    def rename(old, new):
        real(old, new)
        seen.append({path.name: path.read_text() for path in out.iterdir() if path.is_file()})

    out, names = tmp_path / "out", ("a", "config.json", "model.safetensors", "z")
    fill(out, names=names)
    monkeypatch.setattr(os, "rename", rename)
    fill(out, "newer", names)
    assert len(seen) == 8 and seen.pop() == dict.fromkeys(names, "newer")
    assert not any("config.json" in files for files in seen)


def test_a_folder_that_cannot_be_filled_changes_nothing(tmp_path, capsys):
    fill(tmp_path / "out")

    def write():
        with new_folder(str(tmp_path / "out")) as folder:
            (Path(folder) / "config.json").write_text("half")
            full_disk()

    fails(capsys, f"cannot write the folder {tmp_path}/out: ", write)
    assert texts(tmp_path) == {"out/config.json": "new", "out/model.safetensors": "new"}


def test_a_mount_point_is_filled_where_it_is(tmp_path, monkeypatch):
    """As the volume of a container is: the folder cannot be renamed, and what is beside it is another disk, not writable."""
    out, real = tmp_path / "mounted", (os.rename, os.mkdir)

    def rename(old, new):
        if {Path(old).parent, Path(new).parent} & {out.parent}:
            raise OSError(errno.EBUSY, "a mount point")
        real[0](old, new)

    def mkdir(path, *mode):
        if Path(path).parent == out.parent:
            raise OSError(errno.EROFS if not out.exists() else errno.EEXIST, "read-only")
        real[1](path, *mode)

    out.mkdir()
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "mkdir", mkdir)
    for text in ("first", "second"):
        try_folder(str(out))
        fill(out, text, ("config.json",))
    assert texts(out) == {"config.json": "second", "1/config.json": "first"} and list(tmp_path.iterdir()) == [out]


def test_a_real_mount_point_is_filled_where_it_is(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    if subprocess.run(["mount", "--bind", tmp_path / "a", tmp_path / "b"], capture_output=True).returncode:
        pytest.skip("only root can mount")
    try:
        for text in ("first", "second"):
            try_folder(str(tmp_path / "b"))
            fill(tmp_path / "b", text, ("config.json",))
        assert texts(tmp_path / "a") == {"config.json": "second", "1/config.json": "first"}
    finally:
        subprocess.run(["umount", tmp_path / "b"], check=True)


def test_a_link_leads_to_the_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk/out")  # not there yet
    fill(tmp_path / "out")
    fill(tmp_path / "out", "newer", ("config.json",))
    assert (tmp_path / "disk/out/config.json").read_text() == "newer" and (tmp_path / "out").is_symlink()


# --output-dir
def test_an_output_folder_is_tried_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "empty").mkdir()
    for path in ("file", "file/out", "file/a/out", "x" * 260, f"a/{'x' * 300}/out", "/proc/nowhere/out"):
        fails(capsys, "cannot write the folder", try_folder, str(tmp_path / path))
    for path in ("out", "a/b/out", "empty", "empty/out"):
        try_folder(str(tmp_path / path))
    monkeypatch.setattr(tempfile, "mkdtemp", mock.Mock(side_effect=PermissionError(errno.EROFS, "Read-only")))
    fails(capsys, "Read-only", try_folder, str(tmp_path / "a/out"))
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "empty"}
    assert (tmp_path / "file").read_text() == "kept"


OUTPUTS = [
    ("", "the working directory"),
    (".", "the working directory"),
    ("..", "the working directory"),
    ("/", "the working directory"),
    (str(ROOT), "the scripts"),
    ("runs", "the run's own folder"),
    ("runs/mine", "the run's own folder"),
    ("data/mine/../in", "--base-model data/in"),
    ("data", "--base-model data/in"),
    ("data/in/out", "--base-model data/in"),
    ("link", "--base-model data/in"),
    ("file/out", "cannot write the folder file/out"),
]


@pytest.mark.parametrize("output, culprit", OUTPUTS)
def test_an_output_folder_takes_no_other_place(output, culprit, tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to("data/in")
    command = ("--output-dir", output, "--base-model", "data/in", "--run-name", "mine")
    script_fails(culprit, "tests/toy.py", *command, cwd=tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "link"}


def test_a_linked_input_is_no_output(tmp_path):
    (tmp_path / "link").symlink_to("data")
    command = ("--output-dir", "data/in", "--base-model", "link/in")
    script_fails("--base-model link/in", "tests/toy.py", *command, cwd=tmp_path)


def test_the_data_of_the_repository_is_no_output_from_anywhere(tmp_path):
    command = ("--output-dir", ROOT / "data/tiny_pythia", "--base-model", "data/tiny_pythia")
    script_fails("--base-model data/tiny_pythia", "tests/toy.py", *command, cwd=tmp_path)


def test_the_folder_of_the_run_is_tried_first(tmp_path):
    (tmp_path / "runs").write_text("kept")
    script_fails("cannot write the folder runs/mine", "tests/toy.py", "--run-name", "mine", cwd=tmp_path)
    assert (tmp_path / "runs").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def test_an_output_folder_may_lie_beside(tmp_path):
    for number, output in enumerate(("data/out", "data/in.2", "../elsewhere", "runs/models/out", "runs/r3/model")):
        run_here(
            "tests/toy.py", "--output-dir", output, "--base-model", "data/in", "--run-name", f"r{number}", cwd=tmp_path
        )


# what is printed
SPEAK = r"""
import sys
sys.path.insert(0, sys.argv[1])
from plumbing import fail, steady_streams
from tqdm import tqdm
steady_streams()
for update in tqdm(range(3)):
    print("loss", update, "\u2603", "x" * 100_000)
sys.stderr.write("end\n")
for _ in tqdm(range(2)):
    fail("two\nlines")
"""


def speak(shell):
    """What SPEAK writes, started by a shell command in which $SPEAK stands for it."""
    words = [sys.executable, "-c", SPEAK, str(ROOT)]
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "cp1252", "SPEAK": shlex.join(words)}
    done = subprocess.run(["bash", "-c", f'eval "$SPEAK" {shell}'], env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    return done


def test_a_terminal_without_a_character_shows_the_rest():
    done = speak("")
    assert done.returncode == 2 and done.stdout.count("loss") == 3 and "\\u2603" in done.stdout


def test_an_error_has_a_line_of_its_own():
    lines = speak("").stderr.split("\n")
    assert "error: two lines" in lines and "end" in lines


@pytest.mark.parametrize(
    "shell", ["| head -c 10; exit ${PIPESTATUS[0]}", ">&-", "> /dev/full", "2>&-", "< /dev/null >&- 2>&-"]
)
def test_nobody_who_listens_ends_nothing(shell):
    done = speak(shell)
    assert done.returncode == 2
    if "2>&-" not in shell:
        assert "end\n" in done.stderr and "error: two lines" in done.stderr
