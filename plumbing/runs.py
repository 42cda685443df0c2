"""A run's folder runs/NAME, and what a run needs to survive its process.

args.json, metrics.jsonl (one line an update), samples.jsonl, TensorBoard events, result.json, run.png, and checkpoints
checkpoint_<update>_<sha256>.pt. No random generator is saved: every draw of a script is fixed by seed and update.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock
from huggingface_hub import ModelCardData
from tqdm import tqdm

from plumbing import ROOT, fail, find, inputs, try_folder, write_text, writing
from plumbing.flags import flag
from plumbing.processes import barrier, rank, sum_over_processes, world
from plumbing.sharding import fill, split_like, whole


class Run:
    """run = Run(args); run.open(parameters, optimizer); for update in run.updates(count): ...; run.finish(results, caption).

    history: points (name -> number) for the picture, the first name its x axis; state: name -> what else the script needs
    again after --resume. Both are in every checkpoint, as is `inputs`: a run goes on with the same, or not at all.
    """

    def __init__(self, args):
        script, self.resume = os.path.basename(sys.argv[0]), getattr(args, "resume", "")  # judge.py has none
        name = [self.resume or args.run_name or f"{script.removesuffix('.py')}__{args.seed}__{int(time.time())}"]
        if dist.is_initialized():
            dist.broadcast_object_list(name)  # it may hold the time
        self.args, self.script, self.name = args, script, name[0]
        self.dir, self.id, self.board, self.wandb = Path("runs", self.name), uuid.uuid4().hex, None, None
        self.done, self.update, self.history, self.state, self.laps = 0, 0, [], {}, {}
        inputs.clear()
        if rank() == 0:
            self.check_folders()

    # the folder
    def check_folders(self):
        """Ends the program at a name that is taken, a folder that cannot be written, an output in the place of something."""
        if self.dir.exists() and not self.resume:
            fail(f"--run-name {self.name}: {self.dir} already exists, choose another name")
        try_folder(self.dir)
        if hasattr(self.args, "output_dir"):
            names = [name for name in vars(self.args) if name.endswith(("_path", "_model", "dataset"))]
            read = {f"{flag(name)} {path}": find(path) for name in names if (path := getattr(self.args, name))}
            around = {"the working directory": ".", "the scripts": ROOT, "the run's own folder": self.dir}
            output = Path(os.path.realpath(self.args.output_dir))
            for name, path in (around | read).items():
                path = Path(os.path.realpath(path))
                if path.is_relative_to(output) or (name in read and output.is_relative_to(path)):
                    fail(f"--output-dir {self.args.output_dir} must not be, hold or lie in {name}")
            try_folder(self.args.output_dir)

    def open(self, parameters, optimizer):
        """Takes the folder; with --resume goes back to its last whole checkpoint, and `done` updates need not be done again."""
        self.parameters, self.optimizer = parameters, optimizer
        if rank() == 0:  # it alone writes
            self.claim()
            self.put_aside()
        barrier()
        for path in self.checkpoints()[-1:]:
            self.restore(torch.load(path, map_location="cpu", weights_only=True, mmap=self.args.shard))
        if rank() == 0:
            for path in self.dir.glob("*.jsonl"):  # lines after the checkpoint will come again
                with open(path, "rb+") as file:
                    numbers = [(len(line), re.match(rb'{"update": (\d+), ', line)) for line in file]
                    file.truncate(sum(size for size, found in numbers if found and int(found[1]) <= self.done > 0))
            self.start_trackers()

    def claim(self):
        """Takes the name for this process, as long as it lives; the id is in args.json and in every checkpoint of the run."""
        with writing(f"in {self.dir}, where another process may be at work"):
            self.dir.mkdir(parents=True, exist_ok=bool(self.resume))
            self.lock = FileLock(self.dir / ".lock", timeout=0)
            self.lock.acquire()
            if self.resume:
                self.id = json.loads((self.dir / "args.json").read_text()).get("id")  # older runs have none
            arguments = {"script": self.script, "id": self.id} | vars(self.args)
            write_text(self.dir / "args.json", json.dumps(arguments, indent=2))

    def start_trackers(self):
        """TensorBoard where it is installed, Weights & Biases where it is asked for; both get the arguments."""
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter  # here, because it takes a second

            self.board = SummaryWriter(self.dir, purge_step=self.done + 1)
            self.board.add_text("arguments", "\n".join(f"    {flag(name)} {x}" for name, x in vars(self.args).items()))
        if self.args.track:
            same = {"id": self.id, "name": self.name, "resume": "allow", "dir": self.dir}
            self.wandb = import_module("wandb").init(project="drpo", config=vars(self.args), **same)

    def keep(self, files):
        """Texts for the folder, name -> text; a script without updates takes the folder with them."""
        if not hasattr(self, "lock"):
            self.claim()
        for name, text in files.items():
            write_text(self.dir / name, text)

    # checkpoints
    def checkpoints(self):
        """Paths of the run's checkpoints, oldest first."""
        return sorted(self.dir.glob("checkpoint_[0-9]*_*.pt"))

    def put_aside(self):
        """Leaves no checkpoint behind the last whole one of this run: what is damaged or of another run gets another name."""
        for path in reversed(self.checkpoints()):
            with suppress(Exception), open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() in path.name:
                    if torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("id") == self.id:
                        return
            print(f"note: {path} is damaged or of another run, now {path}.damaged")
            os.rename(path, f"{path}.damaged")

    def restore(self, saved):
        """Parameters, optimizer and the rest as they were saved, split again where they are sharded now."""
        known = saved.get("inputs", inputs)  # older checkpoints lack them
        if changed := [name for name in inputs if known.get(name) != inputs[name]]:
            fail(f"--resume {self.name}: changed since the run began: {', '.join(changed)}")
        self.done, self.history, self.state = saved["update"], saved["history"], saved["state"]
        for name, tensor in saved["parameters"].items():
            fill(self.parameters[name], tensor)
        parameters = list(self.parameters.values())
        for number, moments in saved["optimizer"]["state"].items():
            moments.update({name: split_like(tensor, parameters[number]) for name, tensor in moments.items()})
        self.optimizer.load_state_dict(saved["optimizer"])

    def save(self, update):
        """A checkpoint with its checksum in its name; the newest --keep-checkpoints stay. Sharded, all processes take part."""
        if rank() > 0 and not self.args.shard:
            return
        optimizer = self.optimizer.state_dict()
        moments = {number: {name: whole(x) for name, x in own.items()} for number, own in optimizer["state"].items()}
        saved = {"id": self.id, "inputs": inputs, "update": update, "history": self.history, "state": self.state}
        saved["optimizer"] = optimizer | {"state": moments}
        saved["parameters"] = {name: whole(parameter.detach()) for name, parameter in self.parameters.items()}
        if rank() > 0:
            return
        path = self.dir / "checkpoint"
        with writing(path):
            with open(self.dir / "metrics.jsonl", "a") as file:
                os.fsync(file.fileno())  # a power cut must not leave fewer lines than the checkpoint has updates
            with open(f"{path}.tmp", "wb+") as file:
                torch.save(saved, file)
                file.seek(0)
                os.fsync(file.fileno())
                checksum = hashlib.file_digest(file, "sha256").hexdigest()
            os.rename(f"{path}.tmp", f"{path}_{update:08d}_{checksum}.pt")
        for old in self.checkpoints()[: -self.args.keep_checkpoints]:
            os.remove(old)

    # the loop
    def updates(self, count):
        """The numbers of the updates still to do. After each: a checkpoint where one is due, the end where a signal came."""
        signals, numbers, parameters = [], (signal.SIGINT, signal.SIGTERM), self.parameters

        def receive(number, _):
            signals.append(number)
            with suppress(AttributeError, OSError):  # no stderr, or nobody who reads it; print is not safe here
                os.write(sys.__stderr__.fileno(), b"\nstopping after this update; Ctrl-C: at once\n")
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # SIGTERM comes twice where torchrun and a scheduler send it

        for number in numbers:
            signal.signal(number, receive)
        size, where = sum(p.numel() for p in parameters.values()), next(iter(parameters.values())).device
        memory = f"{size:,} weights to train, {16 * size / 2**30:.2f} GiB with gradients and AdamW's numbers"
        machine = f"{world()} x {where} in {self.args.dtype}"
        print(f"{self.dir}: {count} updates of {self.args.batch_size} on {machine}; {memory}")
        if self.history and self.done == 0:  # what the untouched model does
            x, *names = self.history[0]
            self.log({x: 0} | {f"eval/{name}": self.history[0][name] for name in names})
        left = range(self.done + 1, count + 1)
        self.progress = tqdm(left, initial=self.done, total=count, unit="update", disable=rank() > 0)
        for update in self.progress:
            self.update, self.laps, self.clock = update, {}, time.perf_counter()
            yield update
            sum_over_processes(stop := {"signals": len(signals)}, {})
            if update % self.args.save_every == 0 or update == count or stop["signals"]:
                self.save(update)
            if stop["signals"]:
                end = f"stopped after update {update} of {count}; to go on: --resume {self.name}" if rank() == 0 else 1
                barrier(last=True)  # after it there are no ranks
                sys.exit(end)
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)  # nothing left to finish

    def lap(self, name, tokens=0):
        """Seconds since the last lap, for the log as time/NAME, and sampled tokens a second."""
        start, self.clock = self.clock, time.perf_counter()
        self.laps[f"time/{name}"] = self.clock - start
        if tokens:
            self.laps["time/tokens_per_second"] = int(tokens) / (self.clock - start)

    def check_finite(self, rows, **found):
        """Ends the program at NaN or infinity in found (name -> number, or tensor of these rows); names a few of both."""
        if all(torch.as_tensor(x).isfinite().all() for x in found.values()):
            return
        by_row = [x.isfinite().view(len(x), -1).all(1) for x in found.values() if torch.is_tensor(x) and x.ndim]
        rows = sorted(set((rows[~torch.stack(by_row).all(0).cpu()] if by_row else rows).tolist()))
        found |= {f"gradient of {name}": p.grad for name, p in self.parameters.items() if p.grad is not None}
        names = [name for name, value in found.items() if not torch.as_tensor(value).isfinite().all()]
        rows = ", ".join(map(str, rows[:5])) + f" and {len(rows) - 5} more" * (len(rows) > 5)
        rows = f"; rows {rows} of --train-split" * bool(rows)
        fail(f"update {self.update}: not finite: {', '.join(names[:5])}{rows}")

    def log(self, metrics, **shown):
        """One line of metrics.jsonl; `shown` stands beside the progress bar."""
        metrics = {name: x.item() if torch.is_tensor(x) else x for name, x in (metrics | self.laps).items()}
        self.check_finite(torch.empty(0), **metrics)
        if shown:
            self.progress.set_postfix({name: float(x) for name, x in shown.items()})
        self.append("metrics.jsonl", metrics)
        for name, x in metrics.items() if self.board else ():
            self.board.add_scalar(name, x, self.update)
        if self.wandb:
            self.wandb.log(metrics, step=self.update)

    def sample(self, samples):
        """Texts with their numbers, lines of samples.jsonl."""
        for number, sample in enumerate(samples):
            self.append("samples.jsonl", sample)
            if self.board:
                self.board.add_text(f"sample {number}", json.dumps(sample, indent=2, ensure_ascii=False), self.update)

    def append(self, name, line):
        path = self.dir / name
        if rank() == 0:
            with writing(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"update": self.update} | line, ensure_ascii=False) + "\n")

    def finish(self, results, caption, samples=()):
        """result.json; a picture of the history, if there is any; then the samples, the results as a table."""
        from pandas import DataFrame  # comes with datasets; here, because it takes half a second

        table = DataFrame.from_dict(results, orient="index").rename_axis(columns=caption)
        table = table.to_string(float_format="{:.3f}".format)
        if rank() == 0:
            self.keep({"result.json": json.dumps(results, indent=2)})
            if self.history:
                plot(self.history, self.dir / "run.png")
            self.write_card(table)
            if self.board:
                self.board.close()
            if self.wandb:
                self.wandb.finish()
            self.lock.release()  # in a notebook the process lives on
        barrier(last=True)
        print(*samples, "", table, "", sep="\n")
        print(f"final model: {self.args.output_dir}   metrics, arguments, results: {self.dir}")

    def write_card(self, table):
        """Beside the final weights: where they come from, as args.json, result.json and README.md, a model card."""
        args, git, commit = self.args, ["git", "-C", ROOT, "rev-parse", "HEAD"], ""
        for name in ("args.json", "result.json"):
            write_text(f"{args.output_dir}/{name}", (self.dir / name).read_text())
        with suppress(OSError):  # no git
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        sources = {"base_model": getattr(args, "base_model", None) or args.sft_path, "datasets": args.dataset}
        on_hub = {name: path for name, path in sources.items() if not os.path.exists(find(path))}
        header = ModelCardData(library_name="transformers", tags=["rlhf", self.script.removesuffix(".py")], **on_hub)
        text = "{base_model}, trained on {datasets} by {} of DR-PO, commit {}, with the flags in args.json."
        text = text.format(self.script, commit or "unknown", **sources)
        write_text(f"{args.output_dir}/README.md", f"---\n{header}\n---\n\n{text}\n\n```\n{table}\n```\n")


def plot(history, path):
    """A panel for every number of the history against the first of them, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no picture of the run: pip install matplotlib")
    x, *names = history[0]
    figure = Figure(figsize=(12, 2.7 * -(-len(names) // 3)), layout="constrained")
    for number, name in enumerate(names, start=1):
        panel = figure.add_subplot(-(-len(names) // 3), 3, number, title=name, xlabel=x)
        panel.plot([point[x] for point in history], [point[name] for point in history], marker="o", ms=3)
    with writing(path):
        figure.savefig(f"{path}.tmp", dpi=120, format="png", bbox_inches="tight")
        os.replace(f"{path}.tmp", path)
