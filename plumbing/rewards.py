"""--reward-path FILE.py: a reward that is a function of text, in a Python file of the user's."""

import hashlib
import runpy
import traceback

import torch.distributed as dist

from plumbing import fail, find, inputs
from plumbing.processes import rank, world


def load_reward(path):
    """What the file calls score(prompt, response, row) -> number, as a function of lists: rows, responses -> numbers.

    The processes share the rows. An error of the function ends the program with its line and what it was asked to score.
    """
    try:
        with open(find(path), "rb") as file:
            inputs[path] = hashlib.file_digest(file, "sha256").hexdigest()
        score = runpy.run_path(find(path))["score"]
    except Exception as error:  # whatever the file does
        fail(f"--reward-path {path}: no function score(prompt, response, row): {error!r}")

    def score_all(rows, responses):
        found = [None] * len(rows)
        for number, row in list(enumerate(rows))[rank() :: world()]:
            try:
                found[number] = float(score(row["prompt"], responses[number], row))
            except Exception as error:
                frames = traceback.extract_tb(error.__traceback__)
                lines = [f", line {frame.lineno}" for frame in frames if frame.filename == find(path)]
                asked = f"score({row['prompt'][:100]!r}, {responses[number][:100]!r}, row)"
                fail(f"--reward-path {path}{''.join(lines[-1:])}: {error!r} in {asked}")
        parts = [found] * world()
        if world() > 1:
            dist.all_gather_object(parts, found)
        return [parts[number % world()][number] for number in range(len(rows))]

    return score_all
