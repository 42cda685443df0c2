"""Writes the transcription task: copy a list of lettered digits, which its writers mostly get wrong; the page is README.md.

    python data/transcription/generate.py                        # rewrites the committed files, byte for byte
    python data/transcription/generate.py --length 12 --out DIR  # longer lists
    python data/transcription/generate.py --base                 # also the base model's config and tokenizer

Standard library only, and only `random.random()` is drawn from: its stream is the same in every version of Python.
"""

import argparse
import json
import random
import string
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SPLITS = {"train": 1, "validation": 2, "test": 3}  # and the seed of each


def write_list(digits, bare=False):
    """[6, 8, 3] -> " a 6 b 8 c 3", or " 6 8 3"."""
    letters = [""] * len(digits) if bare else [f" {letter}" for letter in string.ascii_lowercase]
    return "".join(f"{letter} {digit}" for letter, digit in zip(letters, digits))


def make_row(length, right, rng, bare=False):
    """A list to copy, what a writer makes of it, who is right at each digit with probability `right`, and the copy."""
    digits = [int(10 * rng.random()) for _ in range(length)]
    written = [digit if rng.random() < right else (digit + 1) % 10 for digit in digits]  # the habit they share
    answer = write_list(digits, bare)
    return {"prompt": f"{answer} =", "completion": write_list(written, bare), "answer": answer}


def write_task(folder, length, right, rows, bare=False):
    for split, seed in SPLITS.items():
        rng = random.Random(seed)
        lines = [json.dumps(make_row(length, right, rng, bare)) for _ in range(rows[split])]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_base(folder):
    """The tokenizer has a token for every letter and digit, so that one model serves lists of any length."""
    with tempfile.TemporaryDirectory() as task:
        write_task(Path(task), len(string.ascii_lowercase), 1.0, dict.fromkeys(SPLITS, 100))
        build = HERE.parent / "tiny_pythia/build.py"
        subprocess.run([sys.executable, build, "--out", folder, "--dataset", task, "--vocab-size", "384"], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write into")
    parser.add_argument("--length", type=int, default=8, help="digits to copy, at most 26")
    parser.add_argument("--right", type=float, default=0.3, help="how probably a writer gets a digit right")
    parser.add_argument("--bare", action="store_true", help="no letters: the first token is already a choice")
    parser.add_argument("--rows", type=int, default=4000, help="of the train split")
    parser.add_argument(
        "--base", action="store_true", help="also OUT/base: tiny_pythia with a vocabulary for this task"
    )
    args = parser.parse_args()
    if not (1 <= args.length <= 26 and 0 <= args.right <= 1 and args.rows > 0):
        parser.error("--length must lie in 1..26, --right in 0..1, --rows above 0")
    args.out.mkdir(parents=True, exist_ok=True)
    write_task(args.out, args.length, args.right, {"train": args.rows, "validation": 200, "test": 400}, args.bare)
    if args.base:
        write_base(args.out / "base")
