"""A run's folder runs/NAME, and what a run needs to survive its process.

args.json, metrics.jsonl (one line an update), result.json, run.png and checkpoint_<update>_<sha256>.pt; each is written under
a temporary name and renamed, so that there is a whole one or none. No random generator is saved: every draw of a script is
fixed by seed and update.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time

import torch
import torch.distributed as dist
from filelock import FileLock
from tqdm import tqdm

from plumbing import fail, write_text, writing
from plumbing.processes import barrier, rank, sum_over_processes, world
from plumbing.sharding import fill, split_like, whole
from plumbing.speed import matmul_rate


class Run:
    """run = Run(args); run.open(parameters, optimizer); for update in run.updates(count): ...; run.finish(results, caption).

    history: points (name -> number) for the picture, the first name its x axis; state: name -> what else the script needs
    again after --resume. Both are saved with every checkpoint and are there again after run.open.
    """

    def __init__(self, args):
        script, self.resume = os.path.basename(sys.argv[0]), getattr(args, "resume", "")  # judge.py has none
        name = [self.resume or args.run_name or f"{script.removesuffix('.py')}__{args.seed}__{int(time.time())}"]
        if dist.is_initialized():
            dist.broadcast_object_list(name)  # it may hold the time
        self.args, self.script, self.name = args, script, name[0]
        self.dir = os.path.join("runs", self.name)
        if os.path.exists(self.dir) and not self.resume and rank() == 0:
            fail(f"--run-name {self.name}: {self.dir} already exists, choose another name")
        self.done, self.history, self.state = 0, [], {}

    def path(self, name):
        return os.path.join(self.dir, name)

    # the folder
    def open(self, parameters, optimizer):
        """Takes the folder; with --resume goes back to its last whole checkpoint, and `done` updates need not be done again."""
        self.parameters, self.optimizer = parameters, optimizer
        optimizer.register_step_post_hook(lambda *_: setattr(self, "stepped", True))
        found = [None]
        if rank() == 0:  # it alone writes and chooses, all read
            self.claim()
            found = [self.newest_checkpoint()]
        if dist.is_initialized():
            dist.broadcast_object_list(found)
        if found[0]:
            self.restore(torch.load(found[0], map_location="cpu", weights_only=True, mmap=self.args.shard))
        if rank() == 0:
            self.cut_metrics()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            SummaryWriter = None
        self.writer = rank() == 0 and SummaryWriter and SummaryWriter(self.dir, purge_step=self.done + 1)

    def claim(self):
        """Takes the name for this process, as long as it lives; what a killed one left half-written goes."""
        folder = self.dir if self.resume else f"{self.dir}.tmp"
        with writing(f"in {self.dir}, where another process may be at work"):
            parent, name = os.path.split(self.dir)
            os.makedirs(parent, exist_ok=True)
            self.lock = FileLock(os.path.join(parent, f".{name}.lock"))  # beside it: a folder in use cannot be renamed
            self.lock.acquire(timeout=0)
            if not self.resume:
                shutil.rmtree(folder, ignore_errors=True)
                os.makedirs(folder)
            for path in [os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".tmp")]:
                (shutil.rmtree if os.path.isdir(path) else os.remove)(path)
            arguments = {"script": self.script} | vars(self.args)
            write_text(os.path.join(folder, "args.json"), json.dumps(arguments, indent=2))
            if not self.resume:
                os.rename(folder, self.dir)  # fails where another run has the name by now

    def keep(self, files):
        """Texts for the folder, name -> text; a script without updates takes the folder with them."""
        if not os.path.exists(self.dir):
            self.claim()
        for name, text in files.items():
            write_text(self.path(name), text)

    def cut_metrics(self):
        """Leaves the lines of metrics.jsonl, one an update, up to the checkpoint; those after it will come again."""
        path = self.path("metrics.jsonl")
        if os.path.exists(path):
            with open(path) as file:
                lines = file.readlines()
            write_text(path, "".join(lines[: self.done]))

    # checkpoints
    def checkpoints(self):
        """Paths of the run's checkpoints, oldest first."""
        names = sorted(name for name in os.listdir(self.dir) if re.fullmatch(r"checkpoint_\d+_\w+\.pt", name))
        return [self.path(name) for name in names]

    def newest_checkpoint(self):
        """Path of the last whole checkpoint, None if there is none; damaged ones are put aside."""
        for path in reversed(self.checkpoints()):
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() in path:
                    return path
            print(f"note: {path} is damaged, now {path}.damaged")
            os.rename(path, f"{path}.damaged")

    def restore(self, saved):
        """Parameters, optimizer and the rest as they were saved, split again where they are sharded now."""
        self.done, self.history, self.state = saved["update"], saved["history"], saved["state"]
        for name, tensor in saved["parameters"].items():
            fill(self.parameters[name], tensor)
        parameters = list(self.parameters.values())
        for number, moments in saved["optimizer"]["state"].items():
            moments.update({name: split_like(tensor, parameters[number]) for name, tensor in moments.items()})
        self.optimizer.load_state_dict(saved["optimizer"])

    def save(self, update):
        """A checkpoint with its checksum in its name; the newest --keep-checkpoints stay. Sharded, all processes take part."""
        path = self.path(f"checkpoint_{update:08d}")
        known = [rank() > 0 or any(name.startswith(path) for name in self.checkpoints())]
        if self.args.shard:
            dist.broadcast_object_list(known)
        if known[0]:
            return
        optimizer = self.optimizer.state_dict()
        moments = {number: {name: whole(x) for name, x in own.items()} for number, own in optimizer["state"].items()}
        saved = {"update": update, "history": self.history, "state": self.state}
        saved["optimizer"] = optimizer | {"state": moments}
        saved["parameters"] = {name: whole(parameter.detach()) for name, parameter in self.parameters.items()}
        if rank() > 0:
            return
        with writing(path):
            with open(self.path("metrics.jsonl"), "a") as file:
                os.fsync(file.fileno())  # a power cut must not leave fewer lines than the checkpoint has updates
            with open(f"{path}.tmp", "wb+") as file:
                torch.save(saved, file)
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                checksum = hashlib.file_digest(file, "sha256").hexdigest()
            os.rename(f"{path}.tmp", f"{path}_{checksum}.pt")
        for old in self.checkpoints()[: -self.args.keep_checkpoints]:
            os.remove(old)

    # the loop
    def updates(self, count):
        """The numbers of the updates still to do. After each: a checkpoint where one is due, the end where a signal came."""
        signals, numbers = [], (signal.SIGINT, signal.SIGTERM)

        def receive(number, _):
            signals.append(number)
            os.write(2, b"\nstopping after this update; Ctrl-C: at once\n")  # note: print is not safe here
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # SIGTERM comes twice where torchrun and a scheduler send it

        for number in numbers:
            signal.signal(number, receive)
        left = range(self.done + 1, count + 1)
        self.progress = tqdm(left, initial=self.done, total=count, unit="update", disable=rank() > 0)
        for update in self.progress:
            self.update, self.stepped, self.laps, self.clock = update, False, {}, time.perf_counter()
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

    def lap(self, name, tokens=0, flops=0):
        """Seconds since the last lap, for the log as time/NAME; sampled tokens a second; on a GPU the share of its speed."""
        start, self.clock = self.clock, time.perf_counter()
        self.laps[f"time/{name}"] = seconds = self.clock - start
        if tokens:
            self.laps["time/tokens_per_second"] = int(tokens) / seconds
        if flops and torch.cuda.is_available():
            self.matmul_rate = getattr(self, "matmul_rate", None) or matmul_rate("cuda", self.args.dtype)
            self.laps["time/mfu"] = flops / (seconds * self.matmul_rate * world())
            self.clock = time.perf_counter()

    def check_finite(self, rows, **found):
        """Ends the program at NaN or infinity; names what holds it, at most five, and the rows of the train split at work.

        found: name -> number, or tensor with as many rows. A checkpoint from before the update is written first, if the
        update has not changed the weights yet.
        """
        if all(torch.as_tensor(x).isfinite().all() for x in found.values()):
            return
        if not self.stepped:
            self.save(self.update - 1)
        barrier()  # rank 0 may still be saving
        bad = [~x.isfinite().view(len(x), -1).all(1) for x in found.values() if torch.is_tensor(x) and x.ndim]
        rows = rows[torch.stack(bad).any(0).cpu()] if bad else rows
        found |= {f"gradient of {name}": p.grad for name, p in self.parameters.items() if p.grad is not None}
        names = [name for name, value in found.items() if not torch.as_tensor(value).isfinite().all()]
        rows = ", ".join(map(str, sorted(rows.tolist())))
        fail(f"update {self.update}: not finite: {', '.join(names[:5])}; rows {rows} of --train-split")

    def log(self, metrics, **shown):
        """One line of metrics.jsonl, the same to TensorBoard where it is installed; `shown` stands beside the progress bar."""
        metrics = {"update": self.update} | metrics | self.laps
        metrics = {name: x.item() if torch.is_tensor(x) else x for name, x in metrics.items()}
        self.progress.set_postfix({name: float(x) for name, x in shown.items()})
        if rank() == 0:
            path = self.path("metrics.jsonl")
            with writing(path), open(path, "a") as file:
                file.write(json.dumps(metrics) + "\n")
                for name, value in metrics.items() if self.writer else ():
                    self.writer.add_scalar(name, value, self.update)

    def finish(self, results, caption):
        """result.json and the same as a table, name -> numbers; a picture of the history, if there is any; farewell."""
        if rank() == 0:
            self.keep({"result.json": json.dumps(results, indent=2)})
            plot(self.history, self.path("run.png"))
        print_table(results, caption)
        print(f"\nfinal model: {self.args.output_dir}   metrics, arguments, results: {self.dir}")
        if rank() == 0:  # in a notebook the process lives on
            self.lock.release()
            if self.writer:
                self.writer.close()
        barrier(last=True)


def print_table(results, caption):
    """Row -> column -> number; the other way round where the names of columns are long."""
    columns = list(next(iter(results.values())))
    if max(map(len, columns)) > 9:
        results = {column: {row: results[row][column] for row in results} for column in columns}
        columns = list(next(iter(results.values())))
    print(f"\n{caption}".ljust(26) + "".join(f"{name:>10}" for name in columns))
    for name, row in results.items():
        print(f"{name:25}" + "".join(f"{x:10.3f}" if isinstance(x, float) else f"{x:10}" for x in row.values()))


def plot(history, path):
    """A panel for every number of the history against the first of them, where matplotlib is installed."""
    if not history:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no picture of the run: pip install matplotlib")
    x, *names = history[0]
    columns, rows = min(3, len(names)), -(-len(names) // 3)
    figure = Figure(figsize=(4 * columns, 2.7 * rows), layout="constrained")
    for number, name in enumerate(names, start=1):
        panel = figure.add_subplot(rows, columns, number, title=name, xlabel=x)
        panel.plot([point[x] for point in history], [point[name] for point in history], marker="o", ms=3)
    with writing(path):
        figure.savefig(path, dpi=120)
