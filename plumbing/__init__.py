"""What the scripts share and what decides no number of a method: reading, checking, saving, resuming, processes, memory.

The rule for a new line here: plain.py says in a few lines what every public name stands for, and a script that uses it in
place of this folder must log the same numbers, up to rounding; a test does that. A loss, a mask, a sampling rule, a schedule,
the default of a coefficient belong in the script. No file here imports a script or asks which one runs. Only --lora-rank and
--dtype change what is computed, the same in every method, because the user asks.

    flags.py      the flags of every script, --resume, numbers that make no sense
    rows.py       datasets of any known shape -> rows of text
    tokens.py     text -> token ids, padding
    models.py     loading and checking, LoRA, recomputation, saving
    logits.py     output heads, log-probs in little memory
    rewards.py    a Python file of the user's as the reward
    processes.py  torchrun: rows dealt out, results put together, gradients added up; micro-batches
    sharding.py   --shard: every model split over the processes
    runs.py       runs/NAME: arguments, metrics, checkpoints, signals, progress, results, picture
    chat.py       judge.py's requests to a chat endpoint: retries, refusals, verdicts kept as they arrive
    plain.py      what all of this stands for; `python -m plumbing.plain drpo.py` writes a script as one file
"""

import io
import itertools
import os
import re
import sys
import tempfile
from contextlib import contextmanager

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
inputs = {}  # what a run has read: model, or dataset and split -> hash; kept in its checkpoints


class Stream(io.FileIO):
    """stdout or stderr: what cannot be said, because nobody reads on or the disk of a log is full, is left out."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def steady_streams():
    """From here on no print ends a program, not even one of a character that the terminal lacks."""
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        if old is getattr(sys, f"__{name}__"):  # else somebody captures it; None: closed from the start
            raw = io.BufferedWriter(Stream(old.fileno() if old else os.devnull, "w", closefd=not old))
            encoding = getattr(old, "encoding", "utf-8")
            setattr(sys, name, io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True))


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
    """A full disk, a folder that cannot be written: one line, and `what`.tmp, if there is such a file, goes.

    A mistake in the body is no such thing and keeps its traceback.
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
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(f"{path}.tmp", path)


def try_folder(path):
    """Ends the program unless new_folder can make and fill `path`; leaves nothing."""
    with writing(f"the folder {path}"):
        parent = path = os.path.realpath(path)
        while not os.path.lexists(parent):
            parent = os.path.dirname(parent)
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            os.makedirs(os.path.join(folder, os.path.relpath(path, parent)), exist_ok=True)


@contextmanager
def new_folder(path):
    """A fresh folder to fill, whose contents then become those of `path`; what was there is kept in path/1, path/2, ...

    The folder itself is never renamed, as a mount point cannot be. config.json goes first and comes last: nothing loads
    what is there in between. A save that is killed leaves a folder *.tmp, which nothing reads.
    """
    with writing(f"the folder {path}"):
        os.makedirs(os.path.realpath(path), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path, suffix=".tmp") as folder:
            yield folder
            is_config = "config.json".__eq__
            stays = re.compile(r"\d+|.*\.tmp|lost\+found").fullmatch  # the last is a disk's own
            if earlier := [name for name in os.listdir(path) if not stays(name)]:
                kept = next(x for n in itertools.count(1) if not os.path.lexists(x := os.path.join(path, str(n))))
                os.mkdir(kept)
                for name in sorted(earlier, key=is_config, reverse=True):
                    os.rename(os.path.join(path, name), os.path.join(kept, name))
                print(f"keeping what was in {path} in {kept}")
            for name in sorted(os.listdir(folder), key=is_config):
                os.rename(os.path.join(folder, name), os.path.join(path, name))
