"""What the sweeps share: many runs of the scripts, as many at a time as there are cores; a run that is done is not done again."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
PYTHONPATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # of a script that is a copy
ONE_CORE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": PYTHONPATH}


def run(name, script, *flags):
    """One run on one core, with what it prints in runs/NAME.log; where it was stopped before, it goes on.

    RuntimeError: it fails, or what is there was made by another text of the script or with other flags (runs/NAME.key).
    """
    text = (ROOT / script).read_bytes() + "\n".join(map(str, flags)).encode()
    key, wanted = ROOT / f"runs/{name}.key", hashlib.sha256(text).hexdigest()
    if (ROOT / f"runs/{name}").exists() and key.exists() and key.read_text() != wanted:
        again = f"remove runs/{name} to run it again, or {key.name} if the change decides no number"
        raise RuntimeError(f"runs/{name} was made by another {Path(script).name}, or with other flags: {again}")
    key.parent.mkdir(exist_ok=True)
    key.write_text(wanted)
    if (ROOT / f"runs/{name}/result.json").exists():
        return
    go_on = ["--resume", name] if (ROOT / f"runs/{name}/args.json").exists() else ["--run-name", name]
    command = [sys.executable, str(script), *map(str, flags), *go_on]
    log = ROOT / f"runs/{name}.log"
    with open(log, "a") as file:
        code = subprocess.run(command, cwd=ROOT, env=os.environ | ONE_CORE, stdout=file, stderr=file).returncode
    if code != 0:
        tail = log.read_text(errors="replace")[-1000:]
        raise RuntimeError(f"{' '.join(command)} ended with {code}; the end of {log}:\n{tail}")


def sweep(title, runs, workers):
    """runs: name -> script and flags. Ends the program at the first that fails, once the others at work have ended."""
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(run, name, *command) for name, command in runs.items()]
        try:
            for job in tqdm(as_completed(jobs), total=len(jobs), desc=title, unit="run"):
                job.result()
        except (RuntimeError, KeyboardInterrupt) as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(str(error) or "stopped; the same command goes on")


def curves(name, *logged):
    """Everything that a run found on its validation split: {"at": [...], "rubric": [...], ...}; at: episodes, or epochs.

    logged: what of the training log stands in the same lines, 0 where it does not.
    """
    found = {}
    for line in map(json.loads, (ROOT / f"runs/{name}/metrics.jsonl").read_text().splitlines()):
        point = {key.removeprefix("eval/"): value for key, value in line.items() if key.startswith("eval/")}
        if not point:
            continue
        point |= {key: line.get(key, 0) for key in logged}
        for key, value in ({"at": line.get("episodes", line.get("epoch", 0))} | point).items():
            found.setdefault(key, []).append(round(value, 4))
    return found


def arguments(description, seeds, **more):
    """The command line of a sweep; more: flag -> what argparse is told of it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, one core each")
    parser.add_argument("--table", action="store_true", help="run nothing, print the tables of the JSON")
    for flag, told in more.items():
        parser.add_argument(f"--{flag}", **told)
    return parser.parse_args()


def last(name):
    """The last column of the table that a run ends with: its policy on the held-out split; and the first, SFT."""
    table = list(json.loads((ROOT / f"runs/{name}/result.json").read_text()).values())
    return {key: round(value, 4) for key, value in table[-1].items()}, table[0]


def write(path, records, *keys):
    """JSON, a record a line; a record replaces the one with the same `keys`, what the file has of others stays."""
    known = json.loads(path.read_text()) if path.exists() else []
    records = {tuple(record[key] for key in keys): record for record in [*known, *records]}.values()
    part = path.with_suffix(".part")
    part.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
    part.replace(path)
