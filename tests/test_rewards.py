"""--reward-path FILE.py: a function of text in the place of the reward model."""

import json
import math
import re
import shutil
import subprocess
from collections import Counter
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import test_updates as slow
import torch
from conftest import ROOT, read_metrics, read_rows, run_here
from test_plain import numbers_of, written
from test_processes import launch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

from data.tldr_mini.rubric import rubric_score
from plumbing.rewards import load_reward

SHORT = ("--total-episodes", 32, "--batch-size", 16, "--minibatch-size", 16, "--num-ppo-epochs", 2, "--eval-every", 2)
SHORT += ("--eval-rows", 8)
WORDS = "def score(prompt, response, row):\n    return len(response.split())\n"
# what was asked, by the process that answered; beside it one number for each prompt, response and row
KEPT = """
import json
from itertools import combinations
import os

def score(prompt, response, row):
    with open(f"asked.{os.getpid()}", "a") as file:
        print(json.dumps([prompt, response, row["completion"]]), file=file)
    return len(response) + 0.01 * len(prompt) - 0.1 * len(row["completion"])
"""


def rule(folder, text, name="rule.py"):
    (folder / name).write_text(text)
    return folder / name


def asked(folder):
    """Process -> what it was asked."""
    return {path.suffix: read_rows(path) for path in sorted(folder.glob("asked.*"))}


def flags_of(models, *more):
    return ("--dataset", models.reference, "--sft-path", models.sft, *SHORT, "--output-dir", "out", *more)


def run(script, models, folder, *more, check=True):
    """The script in `folder`, under the name `run`; -> what run_here returns."""
    return run_here(script, *flags_of(models, "--run-name", "run", *more), cwd=folder, check=check)


@pytest.fixture(scope="module")
def kept(models):
    """A folder with rule.py and what one process of ppo.py made with it."""
    folder = models.folder / "kept"
    folder.mkdir()
    rule(folder, KEPT)
    run("ppo.py", models, folder, "--reward-path", "rule.py", "--save-every", 1)
    return folder


# the numbers
start = slow.start


class Says:
    """A reward model that gives one score, whatever it reads."""

    config = None

    def __init__(self, score):
        self.logits = torch.tensor([[score]], dtype=torch.float64)

    def __call__(self, ids):
        return self


@pytest.mark.parametrize("script", ["ppo.py", "drpo.py"])
def test_whole_updates_in_float64(script, start, tmp_path):
    """As test_updates.py, whose loops these are. A score that reached another row, or one for a cut response, would show."""
    path = rule(
        tmp_path,
        "def score(prompt, response, row):\n"
        "    return 0.2 * len(response.split()) - 0.1 * len(prompt) + 0.3 * len(row['chosen'].split())\n",
    )
    new = {"beta": 0.6, "reset_column": "rejected"} if script == "drpo.py" else {}
    slow.run(script, start, tmp_path, slow.RL | new | {"reward_path": path})
    flags, size, beta = SimpleNamespace(**slow.RL), slow.RL["batch_size"], new.get("beta", 0)
    policy, ref_policy = (slow.load(slow.CAUSAL, start.folder / "sft") for _ in range(2))
    critic = slow.load(slow.SCALAR, start.folder / "sft", num_labels=1)
    critic.config.score_mean = 0  # which this policy's config has, as if it came from a reward model
    torch.nn.init.zeros_(critic.score.weight)
    optimizer, expected, seen = slow.AdamW(flags.max_grad_norm, policy, critic), [], set()
    for update in range(1, slow.UPDATES + 1):
        uniforms = np.random.default_rng([slow.SEED, slow.SAMPLING, update]).random((size, 8), dtype=np.float32)
        chances, places = np.random.default_rng([slow.SEED, slow.RESETS, update]).random((2, size))
        episodes = []
        for row, *draws, chance, place in zip(slow.batch_of(start.rows, size, update), uniforms, chances, places):
            kept = 1 + math.floor(place * (len(slow.answer_of(row, "rejected")) - 1)) if chance < beta else 0
            e = slow.sample(policy, row, *draws, kept, flags.temperature)
            words = [slow.WORDS[token] for token in e.response if token != slow.ENDS[1]]
            value = 0.2 * len(words) - 0.1 * len(row["prompt"]) + 0.3 * len(row["chosen"].split())
            slow.judge(e, policy, ref_policy, critic, Says(value), flags)
            episodes.append(e)
            seen |= {f"ended: {e.ended}", f"reset: {e.kept > 0}"}
        if update == 1:
            assert all(v == 0 for e in episodes for v in e.values)
        advantages = [a for e in episodes for a in e.advantages]
        for e in episodes:
            e.whitened = [(a - np.mean(advantages)) / math.sqrt(np.var(advantages) + 1e-8) for a in e.advantages]
        stats, rng = [], np.random.default_rng([slow.SEED, slow.MINIBATCHES, update])
        for _ in range(flags.num_ppo_epochs):
            order = rng.permutation(size)
            for first in range(0, size, flags.minibatch_size):
                minibatch = [episodes[i] for i in order[first : first + flags.minibatch_size]]
                terms = slow.minibatch_terms(minibatch, policy, critic, flags, set())
                loss = terms["loss/policy"] + flags.vf_coef * terms["loss/value"]
                norm = optimizer.step(loss, slow.decayed(update))
                stats.append({name: x.item() for name, x in terms.items()} | {"grad_norm": norm})
        numbers = {name: np.mean([line[name] for line in stats]) for name in stats[0]}
        numbers["objective/score"] = np.mean([e.score for e in episodes])
        numbers["objective/reward"] = np.mean([sum(e.rewards) for e in episodes])
        expected.append(numbers)
    assert seen >= {"ended: True", "ended: False", "reset: False", f"reset: {beta > 0}"}
    found = read_metrics(tmp_path / "runs/run")
    for ours, theirs in zip(expected, found, strict=True):
        assert {name: theirs[name] for name in ours} == pytest.approx(ours, rel=5e-5, abs=5e-6)
    [file] = (tmp_path / "runs/run").glob(f"checkpoint_{slow.UPDATES:08d}_*.pt")
    weights = {
        f"{kind}.{n}": p for kind, m in (("policy", policy), ("critic", critic)) for n, p in m.named_parameters()
    }
    slow.assert_all_close(torch.load(file, weights_only=True)["parameters"], weights)


def test_it_is_asked_what_the_rows_say(kept, models):
    """The first evaluation, two batches, the second evaluation, then the test split under SFT and policy."""
    [calls] = asked(kept).values()
    splits = {split: read_rows(models.reference / f"{split}.jsonl") for split in ("train", "validation", "test")}
    order = np.random.default_rng([1, 1, 0]).permutation(256)[:32]
    watched, held_out = splits["validation"][:8], splits["test"][:8]
    rows = [*watched, *(splits["train"][i] for i in order), *watched, *held_out, *held_out]
    assert [[prompt, completion] for prompt, _, completion in calls] == [[r["prompt"], r["completion"]] for r in rows]
    tokenizer = AutoTokenizer.from_pretrained(models.sft)
    assert not any(token in text for _, text, _ in calls for token in tokenizer.all_special_tokens)
    assert len({text for _, text, _ in calls}) > 40  # of 112


def test_a_response_without_end_has_the_score_of_one(models, tmp_path):
    rule(tmp_path, "def score(*_):\n    return 5\n")
    run("ppo.py", models, tmp_path, "--reward-path", "rule.py", "--missing-eos-score", -3)
    for line in read_metrics(tmp_path / "runs/run"):
        assert 0 < line["response/eos"] < 1
        assert line["objective/score"] == pytest.approx(5 * line["response/eos"] - 3 * (1 - line["response/eos"]))


def test_the_critic_starts_at_exactly_0(models, tmp_path):
    """Nothing is learned, and every return is the score, 2: half the squared error of a value of 0 is 2, of no other near it."""
    rule(tmp_path, "def score(*_):\n    return 2\n")
    still = ("--learning-rate", 0, "--kl-coef", 0, "--gae-lambda", 1, "--missing-eos-score", 2)
    sft = shutil.copytree(models.sft, tmp_path / "sft")
    config = json.loads((sft / "config.json").read_text()) | {
        "score_mean": 0.7
    }  # as of a policy made from a reward model
    (sft / "config.json").write_text(json.dumps(config))
    run("ppo.py", models, tmp_path, "--reward-path", "rule.py", "--sft-path", sft, *still)
    for line in read_metrics(tmp_path / "runs/run"):
        assert (line["objective/score"], line["objective/reward"]) == (2, 2)
        assert line["loss/value"] == pytest.approx(2, rel=1e-6)


def test_beta_0_is_ppo(kept, models, tmp_path):
    rule(tmp_path, KEPT)
    run("drpo.py", models, tmp_path, "--reward-path", "rule.py", "--beta", 0)
    for ours, theirs in zip(read_metrics(tmp_path / "runs/run"), read_metrics(kept / "runs/run"), strict=True):
        assert {name: ours.get(name) for name in theirs} == theirs
    assert [*asked(tmp_path).values()] == [*asked(kept).values()]


@pytest.mark.slow
def test_two_processes_share_the_rows_and_find_the_same(kept, models, tmp_path):
    rule(tmp_path, KEPT)
    launch(2, "ppo.py", *flags_of(models, "--run-name", "run", "--reward-path", "rule.py"), cwd=tmp_path)
    shares = [*asked(tmp_path).values()]
    assert len(shares) == 2 and len(shares[0]) == len(shares[1])
    together, alone = (Counter(map(tuple, sum(files, []))) for files in (shares, [*asked(kept).values()]))
    assert together == alone  # each response once, by one of them
    for ours, theirs in zip(read_metrics(tmp_path / "runs/run"), read_metrics(kept / "runs/run"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-4)
        assert ours["objective/score"] == pytest.approx(theirs["objective/score"], rel=1e-6)


def test_drpo_scores_the_prefix_too(models, tmp_path):
    rule(tmp_path, KEPT)
    run("drpo.py", models, tmp_path, "--reward-path", "rule.py", "--beta", 1)
    [calls] = asked(tmp_path).values()
    firsts = [response[:2] == completion[:2] for _, response, completion in calls]
    assert all(firsts[8:40])  # with beta 1 every rollout begins as the dataset's answer does
    assert not all(firsts[:8])  # but no evaluation


def test_adapters(models, tmp_path):
    pytest.importorskip("peft")
    run("drpo.py", models, tmp_path, "--reward-path", rule(tmp_path, WORDS), "--lora-rank", 4, "--save-every", 1)
    metrics = read_metrics(tmp_path / "runs/run")
    assert metrics[0]["objective/kl"] == 0 != metrics[1]["objective/kl"]
    assert all(line["policy/first_ratio_error"] < 1e-6 for line in metrics)
    first, last = (torch.load(path, weights_only=True) for path in sorted((tmp_path / "runs/run").glob("*.pt")))
    heads = [[x for name, x in saved["parameters"].items() if "score" in name] for saved in (first, last)]
    assert len(heads[0]) == 1 and heads[0][0].any() and not heads[0][0].equal(heads[1][0])
    assert all("lora" in name or "score" in name for name in first["parameters"])


def test_the_rubric_as_a_reward(models, tmp_path):
    """The example that the repository brings: then the score of the evaluation is the rubric, where every response ended."""
    run("drpo.py", models, tmp_path, "--reward-path", "data/tldr_mini/rubric.py", "--missing-eos-score", -1)
    result = json.loads((tmp_path / "runs/run/result.json").read_text())
    for row in result.values():
        assert row["eos"] < 1 or row["score"] == pytest.approx(row["rubric"], abs=1e-6)
    row = read_rows(models.reference / "test.jsonl")[0]
    module = {}
    exec((ROOT / "data/tldr_mini/rubric.py").read_text(), module)
    assert module["score"]("", row["completion"], row) == rubric_score(row["completion"], row["rubric"])


@pytest.mark.parametrize("text, expected", [("so?", 1), ("so? \n", 1), ("so?!", 0), ("", 0)])
def test_the_question_mark(text, expected):
    module = {}
    exec((ROOT / "data/question_mark.py").read_text(), module)
    assert module["score"]("a?", text, {}) == expected


def test_the_copy_in_one_file_takes_a_function(models, tmp_path):
    path = written("ppo.py", tmp_path / "empty")
    rule(path.parent, "def score(prompt, response, row):\n    return len(response.split()) > 9\n")  # a truth value
    found, results = numbers_of(run_here(path, *flags_of(models, "--reward-path", "rule.py"), cwd=path.parent).stdout)
    run("ppo.py", models, tmp_path, "--reward-path", path.parent / "rule.py")
    for ours, theirs in zip(found, read_metrics(tmp_path / "runs/run"), strict=True):
        for name in ours.keys() - {"policy/first_ratio_error"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=2e-5), name
    saved = json.loads((tmp_path / "runs/run/result.json").read_text())
    assert results == {name: pytest.approx(row, rel=1e-3, abs=2e-5) for name, row in saved.items()}


def test_without_a_rubric_the_function_scores_the_references(models, tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        rows = [{k: row[k] for k in ("prompt", "completion")} for row in read_rows(models.reference / f"{split}.jsonl")]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rule(tmp_path, KEPT)
    run("ppo.py", models, tmp_path, "--reward-path", "rule.py", "--dataset", folder)
    [calls] = asked(tmp_path).values()
    held_out = calls[-8:]
    assert all(response == completion for _, response, completion in held_out)  # after the policy's, the references
    wins = [0.5 + 0.5 * np.sign(len(a[1]) - len(b[1])) for a, b in zip(calls[-16:-8], held_out)]
    result = json.loads((tmp_path / "runs/run/result.json").read_text())["PPO"]
    assert result["eos"] < 1 or result["win_rate"] == pytest.approx(np.mean(wins))


# errors
WRONG_FILES = {
    "no file": (None, ": no function score(prompt, response, row): FileNotFoundError"),
    "syntax": ("x = 1\ndef score(:\n", ": no function score(prompt, response, row): SyntaxError"),
    "raises": ("import math\n\nmath.nothing\n", ": no function score(prompt, response, row): AttributeError"),
    "no score": ("def reward():\n    pass\n", ": no function score(prompt, response, row): KeyError('score')"),
}
WRONG_CALLS = {
    "two arguments": ("def score(prompt, response):\n    return 1\n", "", "TypeError('score() takes 2 positional"),
    "no function": ("score = 3\n", "", "TypeError("),
    "None": ("def score(prompt, response, row):\n    pass\n", "", "TypeError("),
    "text": ("def score(prompt, response, row):\n    return 'good'\n", "", "ValueError("),
    "no column": ("def score(prompt, response, row):\n    return row['answer']\n", ", line 2", "KeyError('answer')"),
    "deep": ("def f(x):\n    return 1 / x\n\ndef score(*_):\n    return f(0)\n", ", line 2", "ZeroDivisionError("),
}


def one_error(done):
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    return line


@pytest.mark.parametrize("script, kind", [*(("ppo.py", kind) for kind in WRONG_FILES), ("drpo.py", "syntax")])
def test_a_wrong_file_is_one_line_before_anything_is_trained(script, kind, models, tmp_path, monkeypatch):
    text, said = WRONG_FILES[kind]
    path = tmp_path / "rule.py" if text is None else rule(tmp_path, text)
    monkeypatch.setattr(subprocess, "Popen", None)  # with which the missing models/sft would be trained
    before = sorted(tmp_path.rglob("*"))
    done = run_here(script, "--dataset", models.reference, "--reward-path", path, cwd=tmp_path, check=False)
    assert one_error(done).startswith(f"error: --reward-path {path}{said}")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", WRONG_CALLS)
def test_a_wrong_function_is_one_line(kind, tmp_path, capsys):
    text, line, error = WRONG_CALLS[kind]
    path = rule(tmp_path, text)
    with pytest.raises(SystemExit) as end:
        load_reward(str(path))([{"prompt": "p" * 200}, {"prompt": "q"}], ["r" * 200, "s"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"error: --reward-path {path}{line}: {error}")
    assert said.endswith(f" in score('{'p' * 100}', '{'r' * 100}', row)\n")


def test_an_error_at_the_first_call_comes_before_the_first_update(models, tmp_path):
    rule(tmp_path, WRONG_CALLS["no column"][0])
    said = one_error(run("drpo.py", models, tmp_path, "--reward-path", "rule.py", check=False))
    prompt = read_rows(models.reference / "validation.jsonl")[0]["prompt"]
    assert said.startswith(f"error: --reward-path rule.py, line 2: KeyError('answer') in score({prompt[:100]!r}, ")
    assert not (tmp_path / "runs/run/metrics.jsonl").exists() and not (tmp_path / "out").exists()


def test_a_score_that_is_not_finite_ends_the_run(models, tmp_path):
    row = np.random.default_rng([1, 1, 0]).permutation(256)[1]  # of the first batch, with an EOS
    prompt = read_rows(models.reference / "train.jsonl")[row]["prompt"]
    rule(tmp_path, f"def score(prompt, *_):\n    return float('inf') if prompt == {prompt!r} else 1\n")
    said = one_error(run("ppo.py", models, tmp_path, "--reward-path", "rule.py", check=False))
    assert said == f"error: update 1: not finite: scores; rows {row} of --train-split"
    rule(tmp_path, "def score(*_):\n    return float('nan')\n")
    said = one_error(run("ppo.py", models, tmp_path, "--reward-path", "rule.py", "--run-name", "all", check=False))
    assert said == "error: update 0: not finite: eval/score"


def test_resume_goes_on_with_the_same_file_or_not_at_all(kept, models, tmp_path):
    shutil.copytree(kept / "runs", tmp_path / "runs")
    path, run_dir = rule(tmp_path, KEPT), tmp_path / "runs/run"
    [last] = run_dir.glob("checkpoint_00000002_*")
    last.unlink()
    path.write_text(KEPT + "\n")
    done = run_here("ppo.py", "--resume", "run", cwd=tmp_path, check=False)
    assert one_error(done) == "error: --resume run: changed since the run began: rule.py"
    path.write_text(KEPT)
    run_here("ppo.py", "--resume", "run", cwd=tmp_path)
    assert read_metrics(run_dir) == read_metrics(kept / "runs/run")


# docs/rewards.md
def written_in_docs(name, folder):
    """The indented block of the page that begins with `# NAME`, as a file."""
    page = (ROOT / "docs/rewards.md").read_text()
    block = re.search(rf"^    # {re.escape(name)}\n((?:    .*\n|\n)+)", page, re.MULTILINE)
    return rule(folder, re.sub("^    ", "", block[0], flags=re.MULTILINE), name)


@pytest.mark.slow
def test_the_page_s_model_with_another_tokenizer(models, tmp_path, monkeypatch):
    """A random GPT-2 that reads words, of which the policy's tokenizer knows nothing."""
    words = sorted({word for row in read_rows(models.reference / "train.jsonl") for word in row["prompt"].split()})
    tokens = Tokenizer(WordLevel({word: id for id, word in enumerate(["<unk>", "<end>", *words])}, unk_token="<unk>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", eos_token="<end>")
    sizes = {"vocab_size": len(tokenizer), "n_positions": 256, "n_embd": 16, "n_layer": 2, "n_head": 2}
    # its EOS pads too: transformers' own reading would take the token before
    config = GPT2Config(**sizes, num_labels=1, pad_token_id=1, initializer_range=0.3)
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(config).eval()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "models/other_reward")
    written_in_docs("other_tokenizer.py", tmp_path)
    (tmp_path / "rule.py").write_text(
        KEPT.replace("def score", "def keep") + "from other_tokenizer import score as other\n"
        "\ndef score(prompt, response, row):\n    keep(prompt, response, row)\n    return other(prompt, response, row)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    # so long that what does not end is longer than what does
    run("ppo.py", models, tmp_path, "--reward-path", "rule.py", "--response-length", 150)
    [calls] = asked(tmp_path).values()
    ids = [[*tokenizer(prompt + response)["input_ids"], 1] for prompt, response, _ in calls]
    with torch.no_grad():
        scores = [model.score(model.transformer(torch.tensor([row])).last_hidden_state)[0, -1, 0].item() for row in ids]
    assert len({*scores}) > 40
    metrics = read_metrics(tmp_path / "runs/run")
    for number, line in enumerate(metrics):
        batch = range(8 + 16 * number, 24 + 16 * number)
        unfinished = round(16 * (1 - line["response/eos"]))
        total = sum(scores[n] for n in batch)
        possible = [total - sum(scores[n] + 1 for n in some) for some in combinations(batch, unfinished)]
        assert min(abs(16 * line["objective/score"] - x) for x in possible) < 1e-4 and unfinished < 4


def test_the_page_s_verifiable_task(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(written_in_docs("largest.py", tmp_path).read_text(), {})
    rows = read_rows(tmp_path / "largest/train.jsonl")
    assert len(rows) == 2000 and all(set(row) == {"prompt", "completion", "answer"} for row in rows)
    check = {}
    exec(written_in_docs("exact.py", tmp_path).read_text(), check)
    for row in rows[:50]:
        assert row["answer"] == max(map(int, re.findall(r"\d", row["prompt"])))
        assert check["score"](row["prompt"], row["completion"], row) == 1
        assert check["score"](row["prompt"], f" {row['answer'] + 1}", row) == 0 == check["score"]("", " none", row)
    flags = ("--dataset", "largest", "--prompt-length", 24, "--response-length", 8, "--eval-split", "validation")
    run("drpo.py", models, tmp_path, *flags, "--reward-path", "exact.py")
    assert len(read_metrics(tmp_path / "runs/run")) == 2
