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

import os
import sys
from contextlib import contextmanager

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def fail(message):
    """Bad input: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
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
