"""Seconds and memory of our scripts, against TRL where it is installed; the same work in turn, several rounds.

    python benchmark/speed.py --rounds 5 --trl-python /path/to/venv_with_trl_1.12.0/bin/python
    python benchmark/speed.py --stop --micro-batch 16 --trl-python ...    # responses end early, batches are taken in parts
    python benchmark/speed.py --sizes tiny --jobs ppo drpo          # ours alone, one size
    python benchmark/speed.py --against DIR --jobs ppo drpo         # the scripts of another checkout, and how soon both start
    python benchmark/speed.py --profile                             # stages, the floor of their arithmetic, what is in a pass
    python benchmark/speed.py --tried                               # settings that were tried, and what they give here
    python benchmark/speed.py --growth --rounds 1                   # cost against batch, response length, vocabulary, width

Models are GPT-NeoX with random weights, prompts have 64 tokens, responses 53; 64 episodes an update and 4 epochs for PPO,
16 pairs for DPO and reward model, float32. Every number comes from the real scripts in processes of their own: seconds
from their metrics.jsonl (TRL: between the ends of two steps), memory is the process's peak. No response ends early (the
output weights of EOS forbid it), unless --stop makes about one token in 25 an EOS and gives the dataset's responses such
lengths. Batches are taken whole, on both sides, unless --micro-batch divides them. The ratio is taken within a round.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SIZES = {"tiny": {"layers": 4, "vocab": 1024}, "14m-like": {"layers": 6, "vocab": 50304}}
BATCH = {"ppo": 64, "drpo": 64, "dpo": 16, "reward_model": 16}
TIMES = {"ppo": 1, "drpo": 3, "dpo": 3, "reward_model": 10}  # updates of each for one of PPO
STAGES = {"ppo": ("rollout", "score", "optimise"), "dpo": ("update",), "reward_model": ("update",)}
STAGES["drpo"] = STAGES["ppo"]
# dpo.py with a clock around its passes for the reference, which it does not log; TRL's seconds hold such passes
WITH_CLOCK = """\
import runpy, sys, time
from plumbing import processes

def in_parts(*args):
    start = time.perf_counter()
    found = plain(*args)
    print(args[-1], time.perf_counter() - start)
    return found

plain, processes.in_parts = processes.in_parts, in_parts
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make(folder, layers, vocab, width=128, rows=512, prompt=64, response=53, stop=False):
    """Random policy, reward model and rows in `folder`: sft/, reward/, reference/, preference/."""
    torch.manual_seed(1)
    words = {"<eos>": 0, "<pad>": 1} | {f"w{number}": number for number in range(2, vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 4 * width,
    }
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "vocab_size": vocab}
    config = GPTNeoXConfig(**sizes, **ids, max_position_embeddings=2048, num_labels=1)
    policy = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # the first hidden number is always 1, and only the logit of EOS reads it
        policy.gpt_neox.final_layer_norm.weight[0], policy.gpt_neox.final_layer_norm.bias[0] = 0, 1
        policy.get_output_embeddings().weight[:, 0] = 0
        policy.get_output_embeddings().weight[0, 0] = np.log(vocab / 25) * 0.7 if stop else -100.0  # at temperature 0.7
    policy.save_pretrained(folder / "sft")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    for name in ("sft", "reward"):
        tokenizer.save_pretrained(folder / name)
    rng = np.random.default_rng(1)

    def text(length):
        return " ".join(f"w{number}" for number in rng.integers(2, vocab, size=length))

    columns = {"reference": ("completion",), "preference": ("chosen", "rejected")}
    for task, names in columns.items():
        (folder / task).mkdir(parents=True)
        for split, count in (("train", rows), ("validation", 1), ("test", 1)):
            lines = []
            for _ in range(count):
                lengths = [min(response - 1, rng.geometric(1 / 25)) if stop else response - 1 for _ in names]
                texts = {name: " " + text(length) for name, length in zip(names, lengths)}
                lines.append({"prompt": text(prompt)} | texts)
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_apart(*args, **kwargs):
    """make() in a process of its own: a process's peak memory is at least that of the one that started it."""
    process = multiprocessing.get_context("spawn").Process(target=make, args=args, kwargs=kwargs)
    process.start()
    process.join()
    if process.exitcode != 0:
        sys.exit("the models could not be made")


def measure(command, cwd, code=0, **environment):
    """-> standard output, peak memory in GiB of a process that must end with the exit code."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        env = os.environ | environment
        process = subprocess.Popen([str(part) for part in command], cwd=cwd, env=env, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, err):
            file.seek(0)
        if process.returncode != code:
            sys.exit(f"{' '.join(map(str, command))}\n{err.read()[-2000:]}")
        return out.read(), usage.ru_maxrss / 2**20


def ours(job, folder, updates, *flags, root=ROOT, **environment):
    """One process of a script in root -> medians without the first update: seconds, also by stage; sampled tokens; peak GiB."""
    batch, name = BATCH[job], f"{job}_{time.time_ns()}"
    lengths = ("--prompt-length", 64, "--response-length", 53, "--micro-batch-size", batch)
    common = ("--seed", 1, "--run-name", name, "--output-dir", f"out/{name}", "--learning-rate", 3e-6, *lengths)
    if job in ("ppo", "drpo"):
        data = ("--dataset", folder / "reference", "--reward-path", folder / "reward", "--temperature", 0.7)
        common += ("--total-episodes", batch * (updates + 1), "--eval-every", 10**6, "--eval-rows", 1, *data)
    else:
        pairs = folder / f"pairs_{updates}"
        if not pairs.exists():
            pairs.mkdir()
            for split, count in (("train", batch * (updates + 1)), ("validation", 1), ("test", 1)):
                lines = (folder / f"preference/{split}.jsonl").read_text().splitlines()[:count]
                (pairs / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        common += ("--dataset", pairs, "--batch-size", batch, "--num-epochs", 1)
        common += ("--reference-dataset", folder / "reference") if job == "reward_model" else ()
    clock = job == "dpo" and (root / "plumbing").exists()  # before plumbing/ its log had these seconds
    environment |= {"PYTHONPATH": str(root)} if clock else {}
    script = [*(("-c", WITH_CLOCK) if clock else ()), root / f"{job}.py", "--sft-path", folder / "sft"]
    out, peak = measure([sys.executable, *script, *common, *flags], folder, **environment)
    lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["update"] > 0]
    found = {stage: statistics.median(line[f"time/{stage}"] for line in lines[1:]) for stage in STAGES[job]}
    if job == "dpo":
        seconds = re.search("log-probs, train (.+)", out)[1] if clock else lines[0]["time/reference"]
        found["reference"] = float(seconds) / len(lines)
    found["seconds"] = sum(found.values())
    if job in ("ppo", "drpo"):
        found["tokens"] = statistics.mean(line["response/length"] - line.get("reset/length", 0) for line in lines[1:])
    return found | {"peak": peak}


def theirs(job, folder, updates, python, micro_batch, stop):
    flags = ("--batch", BATCH[job], "--micro-batch", micro_batch, "--updates", updates, *(("--stop",) if stop else ()))
    out, peak = measure([python, ROOT / "benchmark/speed_trl.py", job, folder, *flags], folder)
    return {"seconds": statistics.median(json.loads(out.splitlines()[-1])), "peak": peak}


def starts(folder, root):
    """Seconds until a script's help is there, and until it refuses a split that the dataset lacks."""
    wrong = ("--eval-split", "nowhere", "--dataset", folder / "reference", "--sft-path", folder / "sft")
    cases = {"ppo.py --help": (0, "--help"), "first error": (2, *wrong, "--reward-path", folder / "reward")}
    found = {}
    for name, (code, *flags) in cases.items():
        start = time.perf_counter()
        measure([sys.executable, root / "ppo.py", *flags], folder, code=code)
        found[name] = time.perf_counter() - start
    return found


def floor(layers, vocab, width=128, rows=64, prompt=64, response=53, epochs=4, reset=0.0):
    """Seconds that the matrix products of the optimise phase need at the rate of a large matrix product here.

    Counted: 2 FLOPs per weight and token forward, 4 backward; layers of policy and critic on every real token, the
    output head on the response tokens alone; attention scores 4 * width FLOPs per pair of tokens, half of them masked.
    """
    x, y = torch.randn(4096, width), torch.randn(width, 4 * width)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        x @ y
        times.append(time.perf_counter() - start)
    rate = 2 * x.numel() * y.shape[1] / statistics.median(times)
    tokens, actions = rows * (prompt + response), rows * response * (1 - reset)
    layer = 12 * width**2 * 2 * tokens + 4 * width * tokens * (prompt + response) / 2
    return epochs * 3 * (2 * layers * layer + 2 * width * vocab * actions) / rate, rate


def show(values, digits=2):
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def show_column(rounds, side, key):
    return show([found[side][key] for found in rounds])


def show_ratio(rounds, above, below, key):
    """Of two sides measured in the same round."""
    return show([found[above][key] / found[below][key] for found in rounds])


def in_turn(sides, count, title):
    """Rounds of all sides, every second one in the opposite order: what else the machine does meets all alike."""
    rounds = []
    for number in range(count):
        names = list(sides) if number % 2 == 0 else list(sides)[::-1]
        rounds.append({name: sides[name]() for name in names})
        print(f"{title} round {number + 1}: {rounds[-1]}", file=sys.stderr, flush=True)
    return rounds


def compare(args, folder):
    """Rounds of all jobs, two sides in turn; a table of medians, ranges, ratios, and what resets save."""
    rows, resets = [], []
    for size in args.sizes:
        make_apart(folder / size, **SIZES[size], stop=args.stop)
        for job in args.jobs:
            updates, micro = args.updates * TIMES[job], args.micro_batch or BATCH[job]
            sides = {"ours": partial(ours, job, folder / size, updates, "--micro-batch-size", micro)}
            if args.against:
                sides["other"] = partial(sides["ours"], root=args.against)
            elif job == "drpo":
                sides["other"] = partial(ours, "ppo", folder / size, updates, "--micro-batch-size", micro)
            elif args.trl_python:
                sides["other"] = partial(theirs, job, folder / size, updates, args.trl_python, micro, args.stop)
            rounds = in_turn(sides, args.rounds, f"{size} {job}")
            column, ratio = partial(show_column, rounds), partial(show_ratio, rounds)
            other = args.against.name if args.against else "ppo.py" if job == "drpo" else "TRL"
            row = [size, f"{job}.py", other, column("ours", "seconds")]
            if "other" in sides:
                row += [column("other", "seconds"), ratio("other", "ours", "seconds")]
                row += [column("ours", "peak"), column("other", "peak"), ratio("ours", "other", "peak")]
            else:
                row += ["-", "-", column("ours", "peak"), "-", "-"]
            rows.append(row)
            if job == "drpo" and not args.against:
                resets.append([size, *(ratio("ours", "other", key) for key in ("seconds", "rollout", "tokens"))])
    titles = ("size", "script", "other", "s per update", "other's", "times faster", "GiB", "other's", "share")
    print_table(titles, rows)
    if resets:
        print("\ndrpo.py at beta 1 as a share of ppo.py")
        print_table(("size", "whole update", "rollout", "tokens sampled"), resets)
    if args.against:
        roots = {"ours": ROOT, "other": args.against}
        sides = {name: partial(starts, folder / size, root) for name, root in roots.items()}
        rounds, rows = in_turn(sides, args.rounds, "start"), []
        for name in rounds[0]["ours"]:
            row = [
                name,
                *(show_column(rounds, side, name) for side in roots),
                show_ratio(rounds, "ours", "other", name),
            ]
            rows.append(row)
        print()
        print_table(("start", "s", "other's", "share"), rows)


def pass_parts(folder, vocab, passes=3, **sizes):
    """Shares of what one forward and backward pass of ppo.py's policy and critic is made of, by torch's profiler."""
    policy, critic, batch, mask = load_pass(folder, vocab)
    one_pass(policy, critic, batch, mask)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(passes):
            one_pass(policy, critic, batch, mask)
    seconds = dict.fromkeys(("matrix products", "attention", "log-softmax", "activation", "rest"), 0.0)
    for event in found.events():
        within, above = event.name, event.cpu_parent
        while above:
            within, above = f"{within} {above.name}", above.cpu_parent
        if any(name in within for name in ("cross_entropy", "LogSoftmaxBackward", "NllLossBackward")):
            part = "log-softmax"
        elif event.name in ("aten::mm", "aten::addmm", "aten::bmm"):
            part = "matrix products"
        else:
            part = "attention" if "scaled_dot" in event.name else "activation" if "gelu" in event.name else "rest"
        seconds[part] += event.self_cpu_time_total / 1e6 / passes
    return seconds


def rollout_parts(folder, vocab, rows=64, prompt=64, response=53, **sizes):
    """Seconds of what one rollout is made of, by a clock around every call of layers and output head."""
    import ppo

    policy, _, (prompt_ids, prompt_mask, *_), _ = load_pass(folder, vocab, rows, prompt, response)
    calls, starts = {"layers": [], "output head": []}, []
    for name, module in (("layers", policy.base_model), ("output head", policy.get_output_embeddings())):
        module.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
        module.register_forward_hook(lambda *_, name=name: calls[name].append(time.perf_counter() - starts.pop()))
    uniforms, budget = torch.rand(rows, response), torch.full((rows,), response)
    for _ in range(2):  # the first is warm-up
        for name in calls:
            calls[name].clear()
        start = time.perf_counter()
        context = (prompt_ids, prompt_mask, uniforms, budget)
        ppo.in_chunks(ppo.generate, policy, rows, *context, lengths=budget, eos=0, temperature=0.7)
        total = time.perf_counter() - start
    found = {"reading the prompt": calls["layers"][0], "layers": sum(calls["layers"][1:])}
    found["output head"] = sum(calls["output head"])
    return found | {"softmax, sampling, cache": total - sum(found.values())}


def load_pass(folder, vocab, rows=64, prompt=64, response=53):
    """-> policy, critic, prompts and responses without padding, action mask: a batch of ppo.py."""
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as the scripts do
    policy = AutoModelForCausalLM.from_pretrained(folder / "sft").eval()
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "reward").eval()
    ids = [torch.randint(2, vocab, (rows, length)) for length in (prompt, response)]
    masks = [torch.ones_like(part, dtype=torch.bool) for part in ids]
    return policy, critic, (ids[0], masks[0], ids[1], masks[1]), masks[1]


def one_pass(policy, critic, batch, mask):
    """-> seconds."""
    import ppo

    start = time.perf_counter()
    ppo.token_logprobs(policy, *batch, mask, 0.7).sum().backward()
    ppo.token_values(critic, *batch).sum().backward()
    for model in (policy, critic):
        model.zero_grad()
    return time.perf_counter() - start


def profile(args, folder):
    """Parts of a pass and of a rollout; seconds by stage, the optimise phase against its floor in the same round."""
    for function in (pass_parts, rollout_parts):
        found = {}
        for size in args.sizes:
            if not (folder / size).exists():
                make(folder / size, **SIZES[size])
            found[size] = function(folder / size, **SIZES[size])
        print(f"\n{function.__doc__}")
        rows = []
        for part in found[args.sizes[0]]:
            rows.append([part, *(f"{x[part]:.2f} ({x[part] / sum(x.values()):.0%})" for x in found.values())])
        print_table(("part", *(f"{size}, s" for size in args.sizes)), rows)
    rows = []
    for size in args.sizes:
        for job in ("ppo", "drpo"):
            found = {name: [] for name in (*STAGES[job], "floor", "ratio", "rate")}
            for _ in range(args.rounds):
                before, _ = floor(**SIZES[size], reset=0.5 if job == "drpo" else 0.0)
                result = ours(job, folder / size, args.updates, "--micro-batch-size", args.micro_batch or BATCH[job])
                after, rate = floor(**SIZES[size], reset=0.5 if job == "drpo" else 0.0)
                result |= {"floor": (before + after) / 2, "rate": rate / 1e9}
                result["ratio"] = result["optimise"] / result["floor"]
                for name, values in found.items():
                    values.append(result[name])
                print(f"{size} {job}: {result}", file=sys.stderr, flush=True)
            rows.append([size, job, *(show(values, 0 if name == "rate" else 2) for name, values in found.items())])
    titles = ("size", "script", *(f"{stage} s" for stage in STAGES["ppo"]), "floor s", "optimise / floor", "GFLOP/s")
    print()
    print_table(titles, rows)


def tried(args, folder):
    """Settings that one might expect to help: seconds of an update of ppo.py as a share of those without, in turn."""
    keep = {"MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_MMAP_THRESHOLD_": str(2**34)}
    variants = {
        "as it is": ((), {}),
        "micro-batches of 32": (("--micro-batch-size", 32), {}),
        "micro-batches of 16": (("--micro-batch-size", 16), {}),
        "glibc keeps freed memory": ((), keep),
        "OMP_WAIT_POLICY=passive": ((), {"OMP_WAIT_POLICY": "passive"}),
    }
    rows = []
    for size in args.sizes:
        make(folder / size, **SIZES[size])
        rounds = []
        for _ in range(args.rounds):
            sides = {name: ours("ppo", folder / size, args.updates, *f, **e) for name, (f, e) in variants.items()}
            rounds.append(sides)
            print(f"{size}: {sides}", file=sys.stderr, flush=True)
        for name in variants:
            rows.append(
                [size, name, show_column(rounds, name, "seconds"), show_ratio(rounds, name, "as it is", "seconds")]
            )
        policy, critic, batch, mask = load_pass(folder / size, SIZES[size]["vocab"])
        times = {"eager": [], "compiled": []}
        for name, values in times.items():
            if name == "compiled":
                for model in (policy, critic):
                    model.base_model.compile()
                start = time.perf_counter()
            one_pass(policy, critic, batch, mask)
            if name == "compiled":
                rows.append([size, "torch.compile, once", f"{time.perf_counter() - start:.0f}", "-"])
            values += [one_pass(policy, critic, batch, mask) for _ in range(2 * args.rounds)]
        shares = [after / before for before, after in zip(*times.values())]
        rows.append([size, "torch.compile, one pass", show(times["compiled"]), show(shares)])
    print_table(("size", "setting", "s", "share"), rows)


def growth(args, folder):
    """Seconds of an update of ppo.py and of drpo.py at beta 1 when one size doubles; a table and a plot."""
    base = {"batch": 64, "response": 53, "vocab": 8192, "width": 128}
    values = {
        "batch": (16, 32, 64, 128),
        "response": (13, 26, 53, 106),
        "vocab": (2048, 8192, 32768),
        "width": (64, 128, 256),
    }
    shapes = {(name, step): base | {name: step} for name, steps in values.items() for step in steps}
    found = {}  # (numbers of a shape, script) -> one result a round; the base is a step of every size, measured once
    for number in range(args.rounds):
        for shape in {tuple(shape.values()): shape for shape in shapes.values()}.values():
            place = folder / "_".join(map(str, shape.values()))
            if number == 0:
                make_apart(place, 4, shape["vocab"], shape["width"], response=shape["response"])
            flags = ("--batch-size", shape["batch"], "--minibatch-size", shape["batch"])
            flags += ("--micro-batch-size", shape["batch"], "--response-length", shape["response"])
            flags += ("--total-episodes", shape["batch"] * (args.updates + 1))
            for job in ("ppo", "drpo"):
                result = ours(job, place, args.updates, *flags)
                found.setdefault((*shape.values(), job), []).append(result)
                print(f"round {number + 1}: {shape} {job}: {result}", file=sys.stderr, flush=True)
    rows, curves = [], {}
    for (name, step), shape in shapes.items():
        for job in ("ppo", "drpo"):
            results = found[(*shape.values(), job)]
            middle = {key: statistics.median(result[key] for result in results) for key in results[0]}
            rows.append([name, step, job, *(f"{middle[key]:.2f}" for key in (*STAGES[job], "seconds", "peak"))])
            curves.setdefault((name, job), []).append((step, middle["seconds"]))
    print_table(("grows", "to", "script", *(f"{stage} s" for stage in STAGES["ppo"]), "update s", "GiB"), rows)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.2), layout="constrained")
    plots = figure.subplots(1, 4, sharey=True)
    for axes, name in zip(plots, values):
        for job in ("ppo", "drpo"):
            axes.plot(*zip(*curves[name, job]), marker="o", label=f"{job}.py")
        axes.set(xscale="log", yscale="log", xlabel=name)
        axes.set_xticks(values[name], [str(value) for value in values[name]])
        axes.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_tick_params(which="minor", length=0, labelcolor="none")
    plots[0].set_ylabel("seconds per update")
    plots[0].legend()
    figure.savefig(ROOT / "docs/growth.png", dpi=110)


def print_table(titles, rows):
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--jobs", nargs="+", choices=BATCH, default=list(BATCH))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--updates", type=int, default=1, help="timed updates of PPO per process, after one for warm-up"
    )
    parser.add_argument("--trl-python", default="", help="python of an environment with trl==1.12.0")
    parser.add_argument("--against", type=Path, help="another checkout of this repository, in place of TRL and ppo.py")
    parser.add_argument("--stop", action="store_true", help="responses end, after 25 tokens on average")
    parser.add_argument("--micro-batch", type=int, default=0, help="rows or pairs per pass; 0: the whole batch at once")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--tried", action="store_true")
    parser.add_argument("--growth", action="store_true")
    args = parser.parse_args()
    if args.against:
        args.against = args.against.resolve()
    with tempfile.TemporaryDirectory() as folder:
        (profile if args.profile else growth if args.growth else tried if args.tried else compare)(args, Path(folder))
