"""plumbing/flags.py: the flags of every script, their numbers, --help, and what --resume may change."""

import json
import re
import runpy
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_here, signals_as_they_were, slow_for
from test_errors import fails

from plumbing import flags

# in every training script, whatever its method; all but the last were there before plumbing/ was
PLUMBING = {
    "run_name": "",
    "resume": "",
    "dataset_config": "",
    "save_every": 20,
    "keep_checkpoints": 2,
    "process_timeout": 1800,
    "micro_batch_size": 64,
    "dtype": "float32",
    "gradient_checkpointing": False,
    "lora_rank": 0,
    "lora_alpha": 32,
    "lora_target": "all-linear",
    "shard": False,
    "max_rows": 0,
    "track": False,
}
OF_JUDGE = (
    "run_name",
    "dataset_config",
    "max_rows",
    "process_timeout",
    "micro_batch_size",
    "dtype",
)  # which trains nothing
# script -> flags that may be 0, besides the seed and the rank of LoRA
MAY_BE_0 = {
    "ppo.py": {"learning_rate", "kl_coef", "vf_coef", "gamma", "gae_lambda"},
    "drpo.py": {"learning_rate", "kl_coef", "vf_coef", "gamma", "gae_lambda", "beta"},
    "rto.py": {"learning_rate", "kl_coef", "vf_coef", "gamma", "gae_lambda", "beta1"},
    "sft.py": {"learning_rate"},
    "reward_model.py": {"learning_rate", "center_coef"},
    "dpo.py": {"learning_rate"},
    "dpo_ln.py": {"learning_rate"},
    "online_dpo.py": {"learning_rate", "total_episodes"},
    "xpo.py": {"learning_rate", "total_episodes", "alpha"},
    "rejection_sampling.py": {"learning_rate"},
}


def caught(name):
    """.name of a script, .Args and .keywords: what it hands to read_args; it comes no further."""
    found = SimpleNamespace(name=name)

    def catch(Args, **keywords):
        found.Args, found.keywords = Args, keywords
        sys.exit()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(flags, "read_args", catch)
        runpy.run_path(str(ROOT / name), run_name="__main__")
    return found


@pytest.fixture(autouse=True)
def signals():
    with signals_as_they_were():
        yield


@pytest.fixture(scope="module", params=slow_for(("dpo_ln.py", "rto.py", "online_dpo.py"), MAY_BE_0))
def script(request):
    return caught(request.param)


@pytest.fixture
def read(script, monkeypatch):
    """read(*flags) -> what read_args of the script makes of them."""

    def read_args(*values):
        monkeypatch.setattr(sys, "argv", [script.name, *(str(value) for value in values)])
        return flags.read_args(script.Args, **script.keywords)

    return read_args


def test_every_script_has_the_same_flags_of_plumbing(script, read):
    args, own = vars(read()), {field.name: field.default for field in fields(script.Args)}
    assert args == own | PLUMBING and not own.keys() & PLUMBING.keys()


def test_judge_has_those_that_do_not_train(monkeypatch, capsys):
    judge = caught("judge.py")
    own = {field.name: field.default for field in fields(judge.Args)}
    monkeypatch.setattr(sys, "argv", [judge.name])
    args = vars(flags.read_args(judge.Args, **judge.keywords))
    assert args == own | {name: PLUMBING[name] for name in OF_JUDGE} and not own.keys() & PLUMBING.keys()
    assert set(judge.keywords["may_be_0"].split()) == {"num_prompts", "max_requests", "api_backoff"}
    monkeypatch.setattr(sys, "argv", [judge.name, "--api-tries", "0"])
    fails(capsys, "--api-tries 0 must be above 0", flags.read_args, judge.Args, **judge.keywords)


def test_flags_are_flat_and_keep_their_names(read):
    args = read("--seed", 3, "--output-dir", "out", "--lora-rank", 8, "--dtype", "bfloat16", "--gradient-checkpointing")
    assert (args.seed, args.output_dir, args.lora_rank, args.dtype) == (3, "out", 8, "bfloat16")
    assert args.gradient_checkpointing


def test_help_shows_the_algorithm_first(script, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = run_here(script.name, "--help", cwd=tmp_path).stdout
    assert " ".join(script.Args.__doc__.split()[:3]) in text and "seed of every random draw" in text
    algorithm, run = text[text.index("algorithm options") :].split("run options")
    for group, names in ((algorithm, [field.name for field in fields(script.Args)]), (run, PLUMBING)):
        shown = re.findall(r"^  --(\w[\w-]+)", group, re.MULTILINE)  # flat: none begins with the name of its group
        assert sorted(shown) == sorted(name.replace("_", "-") for name in names)


# numbers
def test_numbers_that_make_no_sense(script, read, capsys):
    numbers = [name for name, value in vars(read()).items() if type(value) in (int, float)]
    may_be_0 = MAY_BE_0[script.name] | {"seed", "lora_rank", "max_rows"}
    assert len(numbers) > 10 and may_be_0 < set(numbers)
    for name in numbers:
        flag = f"--{name.replace('_', '-')}"
        if name == "missing_eos_score":
            assert read(flag, 0).missing_eos_score == 0 and read(flag, -2.5).missing_eos_score == -2.5
        elif name in may_be_0:
            assert vars(read(flag, 0))[name] == 0
            assert "must be at least 0" in fails(capsys, f"{flag} -1", read, flag, -1).err
        else:
            assert "must be above 0" in fails(capsys, f"{flag} 0", read, flag, 0).err


def test_nan_is_no_number(read, capsys):
    fails(capsys, "--learning-rate nan must be at least 0", read, "--learning-rate", "nan")
    fails(capsys, "--max-grad-norm nan must be above 0", read, "--max-grad-norm", "nan")


def test_numbers_are_finite_and_not_too_large(read, capsys):
    for name, value in vars(read()).items():
        flag = f"--{name.replace('_', '-')}"
        for text in ("inf", "nan", "-inf", "1e999") if type(value) is float else ():
            fails(capsys, flag, read, f"{flag}={text}")
        if type(value) is int and name != "lora_alpha":  # a float with a whole default
            fails(capsys, f"{flag} {2**63} must be finite, a whole number below 2**63", read, flag, 2**63)
    assert read("--seed", 2**63 - 1).seed == 2**63 - 1


def test_shard_needs_torchrun_and_all_weights(read, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    fails(capsys, "--shard runs under torchrun", read, "--shard")
    monkeypatch.setenv("RANK", "0")
    assert read("--shard").shard
    fails(capsys, "without --lora-rank", read, "--shard", "--lora-rank", 2)


# --resume
@pytest.fixture
def run(script, read, tmp_path, monkeypatch):
    """A run of the script by the name of `old`, so far as read_args looks at it: its args.json."""
    monkeypatch.chdir(tmp_path)
    args = vars(read("--seed", 5, "--save-every", 7))
    folder = tmp_path / "runs/old"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"script": script.name} | args))
    return SimpleNamespace(args=args, file=folder / "args.json", growing={"total_episodes", "num_epochs"} & args.keys())


def test_a_resumed_run_has_the_flags_it_had(run, read):
    assert vars(read("--resume", "old")) == run.args | {"resume": "old"}


def test_what_decides_no_number_may_change(run, read, monkeypatch):
    monkeypatch.setenv("RANK", "0")  # for --shard
    new = (
        "--save-every",
        3,
        "--keep-checkpoints",
        4,
        "--output-dir",
        "out",
        "--process-timeout",
        60,
        "--shard",
        "--track",
    )
    args = read("--resume", "old", *new, "--micro-batch-size", 2, "--gradient-checkpointing")
    changed = {name for name, value in vars(args).items() if value != run.args[name]}
    assert changed == set(flags.FREE) and args.seed == 5
    decided = {"seed", "dataset", "learning_rate", "batch_size", "dtype", "lora_rank", "prompt_length"}
    assert not decided & flags.FREE


def test_a_run_can_grow_and_change_in_nothing_else(run, read, capsys):
    fails(capsys, "--seed is 5 in old and cannot change", read, "--resume", "old", "--seed", 1)
    fails(capsys, "--dtype is 'float32' in old and cannot change", read, "--resume", "old", "--dtype", "bfloat16")
    if not run.growing:
        assert json.loads(run.file.read_text())["script"] == "rejection_sampling.py"  # its steps are of one size
        return
    (name,) = run.growing
    flag, old = f"--{name.replace('_', '-')}", run.args[name]
    assert vars(read("--resume", "old", flag, 2 * old + 1))[name] == 2 * old + 1
    run.file.write_text(json.dumps({"script": sys.argv[0]} | run.args | {name: old + 1}))
    fails(capsys, f"{flag} is {old + 1} in old and can only grow", read, "--resume", "old", flag, old)


def test_a_resumed_run_is_checked_as_any_other(run, read, capsys):
    fails(capsys, "--save-every 0 must be above 0", read, "--resume", "old", "--save-every", 0)


def test_saved_flags_are_checked_as_typed_ones(run, read, capsys):
    """A damaged args.json, or one that somebody edited: one line each."""

    def with_args(text):
        run.file.write_text(text)
        return fails(capsys, "--resume old", read, "--resume", "old").err

    for text in ("", "[]", "3", "null", "[1, 2]", '"text"', "{}", "[" * 10**5, '{"script": ', "\ufffe"):
        with_args(text)
    run.file.write_bytes(b"\xff\xfe\x00")
    fails(capsys, "--resume old", read, "--resume", "old")
    good = {"script": sys.argv[0]} | run.args
    assert "--seed cannot be '5'" in with_args(json.dumps(good | {"seed": "5"}))
    assert "--seed cannot be 5.0" in with_args(json.dumps(good | {"seed": 5.0}))
    assert "--seed cannot be True" in with_args(json.dumps(good | {"seed": True}))
    assert "--dtype cannot be 'float16'" in with_args(json.dumps(good | {"dtype": "float16"}))
    assert "--output-dir cannot be None" in with_args(json.dumps(good | {"output_dir": None}))
    assert "--shard cannot be 1" in with_args(json.dumps(good | {"shard": 1}))
    run.file.write_text(json.dumps(good | {"seed": -1}))
    fails(capsys, "--seed -1 must be at least 0", read, "--resume", "old")
    run.file.write_text(json.dumps(good | {"learning_rate": float("inf")}))
    fails(capsys, "--learning-rate inf must be finite", read, "--resume", "old")
    run.file.write_text(json.dumps(good | {"lora_alpha": 64, "max_grad_norm": 2}))  # whole numbers do for others
    assert read("--resume", "old").lora_alpha == 64


def test_what_cannot_be_resumed(run, read, capsys):
    fails(capsys, "--resume nowhere: there is no such run", read, "--resume", "nowhere")
    run.file.write_text(json.dumps({"script": "mine.py"} | run.args))
    fails(capsys, "--resume old is a run of mine.py", read, "--resume", "old")
    run.file.write_text(json.dumps({"script": sys.argv[0]} | run.args | {"momentum": 0.9}))
    fails(capsys, "momentum", read, "--resume", "old")
    run.file.write_text('{"script": ')
    fails(capsys, "--resume old: there is no such run", read, "--resume", "old")
