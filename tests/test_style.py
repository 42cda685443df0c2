"""Inlined code must not drift: the same name has the same text everywhere, and a script stays short."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted(ROOT.glob("*.py"))
TRAINING = [path for path in SCRIPTS if path.name != "judge.py"]
RL = ("ppo.py", "drpo.py")
# shared fields whose docstring may differ between scripts that train on rows, on pairs and on episodes; the type never
DOCSTRING_MAY_DIFFER = {
    "seed": "what is drawn differs",
    "dataset": "columns differ",
    "sft_path": "start, or start and KL anchor",
    "run_name": "not every script makes a picture",
    "eval_split": "not every script makes a picture",
    "beta": "reset probability, or KL strength",
    "batch_size": "rows, pairs or responses",
    "micro_batch_size": "rows, pairs or responses",
    "num_epochs": "the paper's number differs",
    "learning_rate": "the paper's number differs",
    "max_grad_norm": "one model or two",
    "temperature": "of samples shown, or of the rollout",
    "response_length": "pairs are seen whole",
}


def slices(path):
    """Top-level functions, classes and constants of a file by name, as text; decorators included."""
    text = path.read_text(encoding="utf-8")
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
            found[name] = "\n".join(lines[node.lineno - 1 : node.end_lineno])
    return found


def fields(path):
    """Fields of Args: name -> (type, docstring or None, default)."""
    (args,) = (n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    found = {}
    for node, after in zip(args.body, [*args.body[1:], None]):
        if isinstance(node, ast.AnnAssign):
            text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
            found[node.target.id] = (ast.unparse(node.annotation), text or None, ast.unparse(node.value))
    return found


def test_same_name_same_text():
    texts = {}
    for path in (*SCRIPTS, ROOT / "data/tldr_mini/generate.py"):
        for name, text in slices(path).items():
            if name not in ("Args", "main"):
                texts.setdefault(name, {}).setdefault(text, []).append(path.name)
    assert any(len(files) > 1 for versions in texts.values() for files in versions.values())
    differing = {name: list(versions.values()) for name, versions in texts.items() if len(versions) > 1}
    assert not differing


def test_same_field_same_meaning():
    texts = {}
    for path in SCRIPTS:
        for name, (kind, text, _) in fields(path).items():
            meaning = kind if name in DOCSTRING_MAY_DIFFER else (kind, text)
            texts.setdefault(name, {}).setdefault(meaning, []).append(path.name)
    differing = {name: versions for name, versions in texts.items() if len(versions) > 1}
    assert not differing


def test_fields_of_ppo_and_drpo_are_the_same():
    ppo, drpo = (fields(ROOT / name) for name in RL)
    assert list(drpo)[: len(ppo)] == list(ppo)  # what is new comes last
    assert len(drpo) > len(ppo)
    differing = {name for name in ppo if drpo[name] != ppo[name]}
    assert differing == {"output_dir"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_field_is_explained_and_read(path):
    text = path.read_text()
    unread = [name for name in fields(path) if not re.search(rf"\bargs\.{name}\b", text)]
    unexplained = [name for name, (_, docstring, _) in fields(path).items() if not docstring]
    assert not unread and not unexplained


def test_scripts_stay_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in SCRIPTS}
    print(f"lines {lengths}")
    assert lengths["ppo.py"] <= 880
    assert lengths["drpo.py"] <= 925
    assert lengths["dpo.py"] <= 670


def test_drpo_is_ppo_plus_the_idea():
    diff = subprocess.run(["diff", *RL], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    changed = sum(line.startswith(("<", ">")) for line in diff)
    print(f"{changed} changed lines from ppo.py to drpo.py")
    assert 0 < changed <= 80


def test_drpo_fsdp_is_drpo_plus_sharding():
    diff = subprocess.run(["diff", "drpo.py", "drpo_fsdp.py"], cwd=ROOT, capture_output=True, text=True).stdout
    changed = sum(line.startswith(("<", ">")) for line in diff.splitlines())
    print(f"{changed} changed lines from drpo.py to drpo_fsdp.py")
    assert 0 < changed <= 200


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stand_alone(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported and not imported & {script.stem for script in SCRIPTS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_import_does_nothing(path, tmp_path):
    # a socket cannot be connected here, and a flag that the script does not know would end it if it were parsed
    code = "import socket, sys; socket.socket.connect = None; sys.path.insert(0, sys.argv[1]); import " + path.stem
    command = [sys.executable, "-B", "-c", code, str(ROOT), "--unknown"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_shared_sections_are_the_same_text():
    # the run folder and the writer, and what every script does before it reads data; judge.py trains nothing
    for first, last, scripts in (
        ("    # log\n", "purge_step=done + 1)\n", [path for path in TRAINING if path.name != "drpo_fsdp.py"]),
        ("    run_name = ", 'args.dtype == "bfloat16")\n', TRAINING),
        ("    os.environ.setdefault(", 'args.dtype == "bfloat16")\n', SCRIPTS),
    ):
        sections = {}
        for path in scripts:
            text = path.read_text()
            start = text.index(first, text.index("__main__"))
            sections.setdefault(text[start : text.index(last, start)], []).append(path.name)
        assert len(sections) == 1, list(sections.values())
