"""What the scripts share and what decides no number of a method: reading, checking, saving, resuming, processes, memory.

The rule, for whoever adds a line here: plain.py says in a few lines what every public name stands for, with one process,
the whole batch at once and nothing to resume; put in place of this folder, a script must log the same numbers, up to
rounding, and a test does that. A loss, a mask, a sampling rule, an advantage, a schedule, the default of a coefficient
belong in the script, in the order of the paper's algorithm box. No file here imports a script or asks which one runs.
Two flags do change what is computed, the same in every method, because the user asks: --lora-rank and --dtype.

    flags.py      the flags of every script, --resume, numbers that make no sense
    rows.py       datasets of any known shape -> rows of text
    tokens.py     text -> token ids, padding
    models.py     loading and checking, LoRA, recomputation, saving
    logits.py     output heads, log-probs in little memory
    processes.py  torchrun: rows dealt out, results put together, gradients added up; micro-batches
    sharding.py   --shard: every model split over the processes
    runs.py       runs/NAME: arguments, metrics, checkpoints, signals, progress, results, picture
    chat.py       judge.py's requests to a chat endpoint: retries, refusals, verdicts kept as they arrive
    speed.py      FLOPs of an update, speed of a GPU
    rubric.py     the embedded task's exact measure of quality, a property of that data set
    plain.py      what all of this stands for; `python -m plumbing.plain drpo.py` writes a script as one file
    one_file.py   how that is written
"""

import errno
import io
import itertools
import os
import shutil
import sys
import tempfile
import uuid
from contextlib import contextmanager, suppress
from functools import partial

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
inputs = {}  # what a run has read: model, or dataset and split -> hash; kept in its checkpoints


class Stream(io.FileIO):
    """stdout or stderr: what cannot be said, because nobody reads on or the disk of a log is full, is left out."""

    def write(self, data):
        with suppress(OSError):
            return super().write(data)
        return len(data)


def steady_streams():
    """From here on no print ends a program, not even one of a character that the terminal lacks."""
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        if old is getattr(sys, f"__{name}__"):  # else somebody captures it; None: closed from the start
            raw = Stream(old.fileno() if old else os.open(os.devnull, os.O_WRONLY), "w", closefd=False)
            encoding = {"encoding": old.encoding if old else "utf-8", "errors": "backslashreplace"}
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), **encoding, line_buffering=True))


def fail(message):
    """Bad input: one line on stderr, exit code 2."""
    for bar in [*tqdm._instances]:  # each ends its own line
        bar.close()
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)


def find(path):
    """A path as it is; what the repository brings along (data/...) is found from any working directory."""
    own = os.path.join(ROOT, path)
    return own if path.startswith("data/") and not os.path.exists(path) and os.path.exists(own) else path


@contextmanager
def writing(what):
    """A full disk, a folder that cannot be written: one line, and nothing half-written stays.

    what: the path, whose temporary name is `what`.tmp, or words that say what is being written. A mistake in the body
    is no such thing and keeps its traceback.
    """
    try:
        yield
    except Exception as error:
        reason = error.__context__ if isinstance(error.__context__, OSError) else error  # torch raises over it
        if not isinstance(reason, OSError) and "(os error" not in str(reason):  # as libraries in Rust say it
            raise
        if os.path.isfile(f"{what}.tmp"):
            os.remove(f"{what}.tmp")
        fail(f"cannot write {what}: {(str(reason) or repr(reason)).splitlines()[0]}")


def write_text(path, text):
    """Under a temporary name, then renamed."""
    with writing(path):
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(f"{path}.tmp", path)


def place_of(path):
    """A path without links, and whether it must be filled where it is: a mount point, say, cannot be renamed."""
    path, inside = os.path.realpath(path), False
    if os.path.isdir(path):
        try:
            os.rmdir(tempfile.mkdtemp(dir=os.path.dirname(path)))
            os.rename(path, os.path.join(path, "itself"))  # never possible; what matters is the reason
        except OSError as error:
            inside = error.errno != errno.EINVAL
    return path, inside


def try_folder(path):
    """Ends the program unless new_folder can make `path`; leaves nothing."""
    with writing(f"the folder {path}"):
        path, inside = place_of(path)
        parent = path if inside else os.path.dirname(path)
        while not os.path.lexists(parent):
            parent = os.path.dirname(parent)
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            os.makedirs(os.path.join(folder, os.path.relpath(f"{path}.12345678.tmp", parent)))


@contextmanager
def new_folder(path):
    """A fresh folder to fill, which then becomes `path`; what was there is kept as path.1, of a mount point in path/1."""
    with writing(f"the folder {path}"):
        (path, inside), name = place_of(path), f"{uuid.uuid4().hex[:8]}.tmp"
        to = partial(os.path.join, path) if inside else f"{path}.{{}}".format
        folder = to(name)
        os.makedirs(folder)
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder)
            raise
        kept = next(to(str(n)) for n in itertools.count(1) if not os.path.lexists(to(str(n))))
        moves = [(path, kept)] * os.path.lexists(path) + [(folder, path)]
        if inside:
            earlier = [x for x in os.listdir(path) if x != name and not x.isdigit()]
            new = sorted(os.listdir(folder), key="config.json".__eq__)  # last: what is half there cannot be loaded
            parts = ((path, kept, earlier), (folder, path, new))
            moves = [(os.path.join(old, x), os.path.join(end, x)) for old, end, names in parts for x in names]
        for old, end in moves:
            os.renames(old, end)
        if os.path.lexists(kept):
            print(f"keeping the earlier {path} as {kept}")
