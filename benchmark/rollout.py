"""A few rollouts, token by token: what drpo.py makes of each token, as a picture and as a page.

    python benchmark/rollout.py                       # of models/drpo, trained if missing: rollout.png, rollout.html
    python benchmark/rollout.py --policy runs/NAME    # of a run's newest checkpoint, whose critic comes along
    python benchmark/rollout.py --policy "" --beta 1  # what the first update of `python drpo.py --beta 1` sees and does
    python benchmark/rollout.py --script mine.py ...  # of a copy of drpo.py or ppo.py

The script itself runs, from the weights of --policy, to the end of its first update; what its variables then hold is drawn,
or what its own functions make of them. Of its batch --rows rollouts are shown: in turn one from a reset, one from the bare
prompt, one without an EOS, as far as there are such. All other flags are the script's; --beta is 0.5 unless given.
"""

import argparse
import html
import importlib.util
import io
import math
import os
import re
import shlex
import sys
import textwrap
import warnings
from collections import defaultdict
from functools import partial
from itertools import cycle, groupby, islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from plumbing import fail, models, runs, try_folder, write_text, writing  # noqa: E402
from plumbing.sharding import fill  # noqa: E402

POLICY = "models/drpo"
# row of the strip -> name, symbol, decimals, what it is; in braces what explain() fills in
LINES = {
    "mask": ("action mask", "mₜ", 0, "1: the policy chose this token. The dataset's prefix and what is behind the EOS are masked (hatched) and count nowhere."),
    "kl": ("log-ratio", "log π/π_SFT", 2, "one sample of KL(π, π_SFT): negative where π_SFT gives the token more than π. Only its mean over π's own tokens cannot be."),
    "penalty": ("KL penalty", "−λ log π/π_SFT", 3, "what that costs, λ = {kl_coef:g}; where the log-ratio is negative it pays."),
    "score": ("score", "r(x, y)", 3, "of the whole response, prefix included, on its last real token (framed). Without an EOS it is {missing_eos_score:g}."),
    "rewards": ("reward", "rₜ", 3, "KL penalty + score."),
    "values": ("value", "V(sₜ)", 2, "what the critic, before the token is there, expects the rewards from here on to add up to."),
    "advantages": ("advantage", "Âₜ", 2, "how much better than expected it went from here on: GAE with γ = {gamma:g} and a λ of its own, {gae_lambda:g}."),
    "whitened": ("whitened", "(Âₜ − mean)/std", 2, "the advantage in the loss. Over all actions of the batch Âₜ has the mean {mean:.2f} and the standard deviation {std:.2f}."),
    "ratio": ("ratio", "π_new/π", 2, "after one update, {num_ppo_epochs} epochs on {batch_size} rollouts. Framed: clipped (ε = {clip_coef:g}), so without a gradient."),
}  # fmt: skip
SUMMED = ("mask", "kl", "penalty", "score", "rewards")
KINDS = {  # of tokens -> name, short name, colour
    "prefix": ("dataset prefix", "prefix", "#fdd0a2"),
    "own": ("the policy's own tokens", "own", "#c6dbef"),
    "EOS": ("EOS", "EOS", "#6baed6"),
    "behind": ("behind EOS", "–", "#f4f4f4"),
}
LOOKS = {  # of cells in the picture; the page has STYLE
    "plain": {"edgecolor": "#bbbbbb", "linewidth": 0.6},
    "masked": {"edgecolor": "#dddddd", "linewidth": 0.6, "hatch": "////"},
    "framed": {"edgecolor": "black", "linewidth": 1.6, "zorder": 2},
}
STYLE = """body { font: 14px sans-serif; margin: 2em; max-width: 80em; color: #000; print-color-adjust: exact }
table { border-collapse: collapse; margin: 0 0 1em } pre { white-space: pre-wrap; background: #ddd; padding: .5em }
th, td { border: 1px solid #bbb; padding: 2px 5px; text-align: center; font-variant-numeric: tabular-nums }
th[scope=row] { border: 0; text-align: left; font-weight: normal; white-space: nowrap } dd { margin-left: 17em }
dt { float: left } td.sum { border: 0; font-weight: bold; white-space: nowrap } td.framed, th.EOS { border: 2px solid #000 }
td.masked { background: repeating-linear-gradient(45deg, #fff 0, #fff 4px, #ccc 4px, #ccc 5px) }
th.prefix { font-style: italic; border: 1px dashed #000 } th.behind { font-weight: normal }
tr.token th[scope=row] { background: #ddd; text-align: right }
"""


# the numbers
class Stop(BaseException):
    """The first update is done. No Exception, so that nothing on the way holds it up."""


class Start(runs.Run):
    """What stands in for a script's Run: starts from the weights of a policy, ends with update 1, writes nothing."""

    def __init__(self, policy, args):
        self.policy, self.args, self.history = policy, args, [defaultdict(float)]  # as if one had evaluated

    def open(self, parameters, optimizer):
        self.parameters = parameters
        for name, weight in load_weights(self.policy, self.args).items():
            if name not in parameters or parameters[name].shape != weight.shape:
                fail(f"--policy {self.policy}: {name} is no weight that the script trains")
            fill(parameters[name], weight)

    def updates(self, count):
        self.update = 1
        yield self.update

    def lap(self, name, tokens=0):
        pass

    def sample(self, samples):
        pass

    def log(self, metrics, **shown):
        raise Stop


def load_weights(path, args):
    """Name -> weight, as scripts name them: of a run's newest checkpoint, critic included, or of a folder's policy."""
    saved = sorted(Path(path).glob("checkpoint_[0-9]*_*.pt")) if path else []
    if saved:
        try:
            return torch.load(saved[-1], map_location="cpu", weights_only=True)["parameters"]
        except Exception as error:  # of many kinds, whatever the file holds
            fail(f"--policy {path}: cannot read {saved[-1].name}: {(str(error) or repr(error)).splitlines()[0]}")
    if not path:
        return {}
    models.build_missing(path)
    policy = models.load_model(AutoModelForCausalLM, path, models.load(AutoTokenizer, args.sft_path), args, "cpu")
    return {f"policy.{name}": weight for name, weight in policy.named_parameters()}


def first_update(path, policy, flags):
    """A script as it is at the end of its first update: an object with its functions and variables."""
    main, script = sys.modules["__main__"], ModuleType("__main__")  # there tyro looks for what the flags mean
    script.__file__ = path = path if os.path.exists(path) else os.path.join(ROOT, path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--script {path}: {error}")
    if "action_mask" not in text:
        fail(f"--script {path} has no rollouts; drpo.py, ppo.py and copies of them have")
    beta = ["--beta", "0.5"] if re.search("^    beta: float", text, re.MULTILINE) else []  # the last one counts
    with (
        mock.patch.object(sys, "argv", [path, *beta, *flags]),
        mock.patch.object(runs, "Run", partial(Start, policy)),
    ):
        sys.modules["__main__"] = script
        try:
            exec(compile(text, path, "exec"), vars(script))
        except Stop:
            pass
        finally:
            sys.modules["__main__"] = main
    return script


@torch.no_grad()
def measure(s):
    """Row of the picture -> tensor (B, R), from the variables and the functions of a script; and what is clipped."""
    masks, none, args = (s.action_mask, s.response_mask), torch.zeros_like, s.args
    inputs = (s.token_logprobs, s.policy, s.size, *s.batch, s.action_mask)
    new_logprobs = s.in_chunks(*inputs, lengths=s.lengths, temperature=s.temperature)
    losses = [s.policy_loss(new_logprobs, s.logprobs, s.advantages, clip) for clip in (args.clip_coef, math.inf)]
    found = {
        "mask": s.action_mask,
        "kl": s.kl,
        "penalty": s.make_rewards(s.kl, none(s.scores), *masks, args.kl_coef),  # the two parts of a reward
        "score": s.make_rewards(none(s.kl), s.scores, *masks, args.kl_coef),
        "rewards": s.rewards,
        "values": s.values,
        "advantages": s.compute_gae(s.rewards, s.values, s.action_mask, args.gamma, args.gae_lambda)[0],
        "whitened": s.advantages,
        "ratio": (new_logprobs - s.logprobs).exp(),
        "clipped": losses[0] > losses[1],
    }
    if bad := [name for name, tensor in found.items() if not tensor.isfinite().all()]:
        fail(f"not finite after the update: {', '.join(bad)}")
    return found


def choose(reset, ended, count):
    """Numbers of the rollouts to draw: in turn one from a reset, one from the prompt, one unfinished, or the next best."""
    wishes = (lambda n: (not reset[n], not ended[n]), lambda n: (reset[n], not ended[n]), lambda n: ended[n])
    left, found = list(range(len(ended))), []
    for wish in islice(cycle(wishes), min(count, len(left))):
        found.append(min(left, key=wish))
        left.remove(found[-1])
    return found


# what picture and page show
def show(name, x):
    """A number as it is drawn: signed, but for mask and ratio, without a negative zero."""
    return f"{x:{'' if name in ('mask', 'ratio') else '+'}z.{LINES[name][2]}f}".replace("-", "−")


def level(name, x):
    """What decides the colour of a number: itself, of a ratio its logarithm."""
    return math.log(max(x, 1e-9)) if name == "ratio" else x


def colour(x, end):
    """Blue above 0, orange below, white at it, full at end."""
    strength, full = 0.65 * min(1, abs(x) / (end or 1)), (67, 147, 195) if x > 0 else (230, 120, 40)
    return "#{:02x}{:02x}{:02x}".format(*(round(255 + strength * (c - 255)) for c in full))


def describe_token(s, seen, n, t, ends):
    """A column: kind, text, id, inches; cells, row -> (text, colour, look)."""
    id, action, behind = int(s.response_ids[n, t]), bool(s.action_mask[n, t]), not s.response_mask[n, t]
    kind = "behind" if behind else "prefix" if not action else "EOS" if id in s.eos else "own"
    text = "EOS" if kind == "EOS" and id in s.tokenizer.all_special_ids else s.tokenizer.decode([id])
    text = text.strip() if text.strip().isprintable() and text.strip() else repr(text)[1:-1]
    text, last, cells = "" if behind else text, t == int(s.response_mask[n].sum()) - 1, {}
    for name in LINES:
        x, framed = float(seen[name][n, t]), (name == "score" and last) or (name == "ratio" and seen["clipped"][n, t])
        look = "masked" if name != "mask" and not action else "framed" if framed else "plain"
        drawn = look != "masked" and (name != "score" or last)
        face = colour(level(name, x), ends[name]) if drawn and name != "mask" else "#ffffff"
        cells[name] = show(name, x) if drawn else "", face, look
    return SimpleNamespace(kind=kind, text=text, id=id, width=max(0.48, 0.14 + 0.07 * len(text)), cells=cells)


def describe(s, seen, chosen):
    """Of each rollout the title, outcome, prompt, sums of rows, columns."""
    pairs, lengths = s.action_mask[chosen].nonzero().tolist(), s.response_mask.sum(1).tolist()
    ends = {name: max(abs(level(name, float(seen[name][chosen[i], t]))) for i, t in pairs) for name in LINES}
    for n in chosen:
        row, real, k = s.rows[n], lengths[n], int(s.reset_len[n]) if hasattr(s, "reset_len") else 0
        sums = {name: show(name, float(seen[name][n].sum())) for name in SUMMED}
        outcome = f"The score {sums['score']} lands on the EOS, token {real}."
        if not s.ended[n]:
            raw = s.score_responses(s.reward, [row], [x[n : n + 1] for x in s.batch], s.tokenizer, s.size)
            raw = show("score", float(raw))
            outcome = f"No EOS within {real} tokens: the score is {sums['score']}, not r(x, y) = {raw}."
        outcome += f" Sum of rewards: {sums['score']} − {s.args.kl_coef:g} · ({sums['kl']}) = {sums['rewards']}"
        start = f"from a dataset reset: {k} of {len(row['reset_ids'])} tokens kept" if k else "from the bare prompt"
        shown = range(min(max(lengths[i] for i in chosen), real + 2))  # two behind the EOS say enough
        columns = [describe_token(s, seen, n, t, ends) for t in shown]
        title, prompt = f"Row {s.picked[n]} of {s.args.train_split}, {start}", row["prompt"]
        yield SimpleNamespace(title=title, outcome=outcome, prompt=prompt, sums=sums, columns=columns)


def strips(columns, limit=7.5):
    """The columns in strips of at most so many inches: -> lists of columns."""
    found, used = [[]], 0.0
    for column in columns:
        if used + column.width > limit and found[-1]:
            found, used = [*found, []], 0.0
        found[-1].append(column)
        used += column.width
    return found


def groups(columns):
    """Neighbours of one kind: -> pairs of kind and columns."""
    return [(kind, [*group]) for kind, group in groupby(columns, key=lambda column: column.kind)]


def prompt_end(prompt):
    """Its last words."""
    tail = prompt[-32:].replace("\n", " ")
    return f"… {tail.partition(' ')[2] or tail}"


# the picture
def picture(path, title, notes, rollouts, legend):
    """The PNG: strips, then the legend. Lengths are inches, y goes down."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from PIL import Image  # comes with matplotlib

    step, left, full = 0.21, 2.2, 10.4
    drawn = [(x, strip) for x in rollouts for strip in strips(x.columns)]
    head, tall, start = 0.55, (len(LINES) + 2) * step + 0.24, 0.4 + 0.2 * len(notes)
    height = start + head * len(rollouts) + tall * len(drawn) + step * len(LINES) + 0.05
    figure = Figure(figsize=(full, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, full), ylim=(height, 0))
    axes.axis("off")

    def write(x, y, text, size=8.0, **style):
        axes.text(x, y, text, size=size, va="center_baseline", parse_math=False, **style)

    def box(x, y, width, text, face, look="plain", size=8.0, **style):
        axes.add_patch(Rectangle((x, y), width, step, **({"facecolor": face} | LOOKS[look])))
        write(x + width / 2, y + step / 2, text, size, ha="center", **style)

    write(0.15, 0.2, title, 11, weight="bold")
    for number, note in enumerate(notes):
        write(0.15, 0.43 + 0.18 * number, textwrap.shorten(note, 160, placeholder=" …"), color="#444444")
    y = start
    for rollout, strip in drawn:
        first, last = strip[0] is rollout.columns[0], strip[-1] is rollout.columns[-1]
        if first:
            write(0.15, y + 0.12, rollout.title, 9.5, weight="bold")
            write(0.15, y + 0.34, rollout.outcome, 8.5)
            write(left - 0.08, y + head + step / 2, "end of the prompt x", 7, ha="right")
            y += head
        box(0.15, y + step, left - 0.15, prompt_end(rollout.prompt) if first else "(goes on)", "#d9d9d9")
        x = left
        for kind, columns in groups(strip):
            width, (long, short, face) = sum(column.width for column in columns), KINDS[kind]
            box(x, y, width, long if width > 0.075 * len(long) else short, face, size=7)
            for column in columns:
                box(x, y + step, column.width, column.text, face, weight="bold")
                for row, cell in enumerate(column.cells.values(), start=2):
                    box(x, y + row * step, column.width, *cell, size=7.3)
                x += column.width
        for row, (name, (label, symbol, *_)) in enumerate(LINES.items(), start=2):
            write(0.15, y + (row + 0.5) * step, label)
            write(left - 0.08, y + (row + 0.5) * step, symbol, 7.5, ha="right", color="#444444")
            if last and name in SUMMED:
                write(x + 0.6, y + (row + 0.5) * step, rollout.sums[name], 7.5, ha="right", weight="bold")
        write(x + 0.6, y + 1.5 * step, "Σ" if last else "", 9, ha="right", weight="bold")
        y += tall
    for row, (name, (label, symbol, *_)) in enumerate(LINES.items()):
        write(0.15, y + row * step, label, weight="bold")
        write(1.1, y + row * step, symbol)
        write(left, y + row * step, legend[name])
    with writing(path), warnings.catch_warnings(action="ignore"):  # of letters that the font lacks; the page has them
        figure.savefig(whole := io.BytesIO(), dpi=160)
        Image.open(whole).convert("RGB").quantize(128).save(f"{path}.tmp", "png", optimize=True)  # a third of the bytes
        os.replace(f"{path}.tmp", path)


# the page
def page(title, notes, rollouts, legend):
    """The HTML, which needs nothing else: the same strips under whole prompts. What is text there is text here."""
    esc = html.escape
    lines = [f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>{esc(title)}</title>']
    lines += [f"<style>\n{STYLE}</style>\n<h1>{esc(title)}</h1>", *(f"<p>{esc(note)}</p>" for note in notes), "<dl>"]
    lines += [f"<dt><b>{line[0]}</b> {line[1]}</dt><dd>{esc(legend[name])}</dd>" for name, line in LINES.items()]
    lines += ["</dl>"]
    for x in rollouts:
        lines += [f"<h2>{esc(x.title)}</h2>\n<p>{esc(x.outcome)}</p>\n<pre>{esc(x.prompt)}</pre>"]
        for strip in strips(x.columns):
            lines += ["<table>\n<tr><th scope=row>end of the prompt x</th>"]
            for kind, columns in groups(strip):
                style = f"class={kind} colspan={len(columns)} style=background:{KINDS[kind][2]}"
                lines += [f"<th {style}>{esc(KINDS[kind][0])}</th>"]
            lines += [f"</tr>\n<tr class=token><th scope=row>{esc(prompt_end(x.prompt))}</th>"]
            for column in strip:
                style = f'class={column.kind} style=background:{KINDS[column.kind][2]} title="id {column.id}"'
                lines += [f"<th {style}>{esc(column.text)}</th>"]
            for name, (label, symbol, *_) in LINES.items():
                lines += [f"</tr>\n<tr class={name}><th scope=row>{label}, {symbol}</th>"]
                for text, face, look in (column.cells[name] for column in strip):
                    lines += [f"<td class={look}{'' if look == 'masked' else f' style=background:{face}'}>{text}</td>"]
                if name in SUMMED and strip[-1] is x.columns[-1]:
                    lines += [f"<td class=sum>Σ {x.sums[name]}</td>"]
            lines += ["</tr>\n</table>"]
    return "\n".join([*lines, "</html>\n"])


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--script", default="drpo.py", help="drpo.py, ppo.py or a copy of one")
    parser.add_argument("--policy", default=POLICY, help='folder, hub name or runs/NAME; "": where the script starts')
    parser.add_argument("--rows", type=int, default=3, help="rollouts to draw")
    parser.add_argument("--out", default="rollout", help="the files, without .png and .html")
    options, flags = parser.parse_known_args()
    if importlib.util.find_spec("matplotlib") is None:
        fail("the picture needs matplotlib: pip install matplotlib")
    if options.rows < 1 or not os.path.basename(options.out):
        fail("--rows must be at least 1, and --out must end with the name of a file")
    try_folder(os.path.dirname(os.path.abspath(options.out)))
    script = first_update(options.script, options.policy, flags)
    args, seen = script.args, measure(script)
    reset = script.reset_len > 0 if hasattr(script, "reset_len") else torch.zeros_like(script.ended)
    rollouts = [*describe(script, seen, choose(reset.tolist(), script.ended.tolist(), options.rows))]
    actions, negative = seen["advantages"][seen["mask"]], int((seen["kl"] < 0).sum())
    moments = {"mean": float(actions.mean()), "std": float(actions.std(correction=0))}
    legend = {name: line[3].format(**vars(args), **moments).replace(" -", " −") for name, line in LINES.items()}
    notes = [
        shlex.join(["python", "benchmark/rollout.py", *sys.argv[1:]]),
        f"π: {options.policy or args.sft_path}, π_SFT: {args.sft_path}, reward: {args.reward_path}",
        f"Of the {len(actions)} actions of the whole batch {negative} have a negative log-ratio; summed over a rollout, "
        f"log-ratios are {show('kl', float(seen['kl'].sum(1).mean()))} on average.",
    ]
    title = f"{len(rollouts)} of {args.batch_size} rollouts, token by token"
    write_text(f"{options.out}.html", page(title, notes, rollouts, legend))
    picture(f"{options.out}.png", title, notes, rollouts, legend)
    print(f"{options.out}.png and {options.out}.html")
