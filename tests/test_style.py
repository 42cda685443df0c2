"""The shape of the repository: what decides a number stands in the scripts, in the same words everywhere, and stays short."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted(ROOT.glob("*.py"))
TRAINING = [path for path in SCRIPTS if path.name not in ("judge.py", "expo.py")]
PLUMBING = sorted((ROOT / "plumbing").glob("*.py"))
RL, ONLINE = ("ppo.py", "drpo.py", "rto.py"), ("online_dpo.py", "xpo.py")
OF_ROWS = ("sft.py", "dpo.py", "dpo_ln.py", "reward_model.py")
# lines; a script that grows past its cap has caught plumbing: move that, do not raise this
CAPS = {"sft.py": 240, "dpo.py": 240, "reward_model.py": 250, "ppo.py": 400, "drpo.py": 450, "judge.py": 500}
CAPS |= {"rto.py": 430, "online_dpo.py": 380, "xpo.py": 400, "rejection_sampling.py": 340}
CAPS |= {"dpo_ln.py": 240, "expo.py": 120}
PLUMBING_CAP, PLAIN_CAP, SHAPES_CAP = 1700, 170, 130
# child -> its parent, and how many lines may differ
FAMILY = {
    "drpo.py": ("ppo.py", 75),
    "rto.py": ("ppo.py", 40),
    "xpo.py": ("online_dpo.py", 45),
    "dpo_ln.py": ("dpo.py", 25),
}
# shared fields whose docstring may differ between scripts that train on rows, on pairs and on episodes; the type never
DOCSTRING_MAY_DIFFER = {
    "seed": "what is drawn differs",
    "dataset": "columns differ",
    "sft_path": "start, or start and KL anchor",
    "eval_split": "not every script makes a picture",
    "beta": "reset probability, or KL strength",
    "batch_size": "rows, pairs or responses",
    "num_epochs": "the paper's number differs",
    "learning_rate": "the paper's number differs",
    "max_grad_norm": "one model or two",
    "temperature": "of samples shown, or of the rollout",
    "reward_path": "a model, in RL also a function",
    "samples_per_prompt": "what becomes of them differs",
}


def lines_of(path):
    return len(path.read_text(encoding="utf-8").splitlines())


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


def fields(path, *classes):
    """Fields of Args, or of the classes named: name -> (type, docstring or None, default)."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name in (classes or ("Args",)):
            for field, after in zip(node.body, [*node.body[1:], None]):
                if isinstance(field, ast.AnnAssign):
                    text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
                    found[field.target.id] = (ast.unparse(field.annotation), text or None, ast.unparse(field.value))
    return found


def imports(path):
    """Module -> names that a file takes from it; for `import module`, none."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name: set() for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return found


RUN_FIELDS = fields(ROOT / "plumbing/flags.py", "MachineArgs", "RunArgs")


# same words
def test_same_name_same_text():
    texts = {}
    for path in SCRIPTS:
        for name, text in slices(path).items():
            if name != "Args":
                texts.setdefault(name, {}).setdefault(text, []).append(path.name)
    assert any(len(files) > 1 for versions in texts.values() for files in versions.values())
    differing = {name: list(versions.values()) for name, versions in texts.items() if len(versions) > 1}
    assert not differing


def test_no_script_defines_a_name_of_plumbing():
    shared = set().union(*(slices(path) for path in PLUMBING))
    assert "in_chunks" in shared
    for path in SCRIPTS:
        assert not slices(path).keys() & shared, path.name


def test_same_field_same_meaning():
    texts = {}
    for path in SCRIPTS:
        for name, (kind, text, _) in fields(path).items():
            meaning = kind if name in DOCSTRING_MAY_DIFFER else (kind, text)
            texts.setdefault(name, {}).setdefault(meaning, []).append(path.name)
    differing = {name: versions for name, versions in texts.items() if len(versions) > 1}
    assert not differing


@pytest.mark.parametrize("name", FAMILY)
def test_a_child_has_the_fields_of_its_parent(name):
    parent, child = (fields(ROOT / path) for path in (FAMILY[name][0], name))
    assert list(child)[: len(parent)] == list(parent)  # what is new comes last
    assert len(child) > len(parent) or name == "dpo_ln.py"
    differing = {field for field in parent if child[field] != parent[field]}
    assert differing == ({"output_dir", "beta"} if name == "dpo_ln.py" else {"output_dir"})


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_field_is_explained_and_read(path):
    text = "".join(file.read_text() for file in (path, *PLUMBING))  # plumbing cuts at --prompt-length, say
    assert fields(path) and not fields(path).keys() & RUN_FIELDS.keys()
    unread = [name for name in fields(path) if not re.search(rf"\bargs\.{name}\b", text)]
    unexplained = [name for name, (_, docstring, _) in fields(path).items() if not docstring]
    assert not unread and not unexplained


def test_every_flag_of_plumbing_is_explained_and_read():
    text = "".join(path.read_text() for path in (*PLUMBING, *SCRIPTS))
    assert len(RUN_FIELDS) > 10
    unread = [name for name in RUN_FIELDS if not re.search(rf"\bargs\.{name}\b|\bargs, \"{name}\"", text)]
    unexplained = [name for name, (_, docstring, _) in RUN_FIELDS.items() if not docstring]
    assert not unread and not unexplained


def test_a_new_line_says_why():
    for path in SCRIPTS:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert not re.search(r"# new in [\w-]+:?$", line), f"{path.name}:{number}"


def test_shared_sections_are_the_same_text():
    for first, last, scripts in (
        ("# reading, checking, saving", "from plumbing", SCRIPTS),
        ("        sum_over_processes(sums, parameters)\n", "        sums[", OF_ROWS),
        ("        run.check_finite(picked, **sums)\n", "        # ", OF_ROWS),
        ("    epochs = range(args.num_epochs)", "\n\n", OF_ROWS),
        ("        # 3 score", "        # 6 log", ("ppo.py", "drpo.py")),
        ("        # 1 sample prompts", "        # 3 score", ("ppo.py", "rto.py")),
        ("        # 5 PPO epochs", "        # 6 log", RL),
        ("            # 1 a new round", "            # 2 rollout", ONLINE),
        ("        # 6 step", "    run.finish", ONLINE),
    ):
        sections = {}
        for path in (ROOT / name for name in scripts):
            text = path.read_text()
            start = text.index(first)
            sections.setdefault(text[start : text.index(last, start + len(first))], []).append(path.name)
        assert len(sections) == 1, list(sections.values())


# short
@pytest.mark.parametrize("name", CAPS)
def test_a_script_stays_short(name):
    assert lines_of(ROOT / name) <= CAPS[name]


def test_the_repository_stays_short():
    assert {path.name for path in SCRIPTS} == CAPS.keys()
    assert lines_of(ROOT / "plumbing/plain.py") <= PLAIN_CAP
    assert sum(map(lines_of, PLUMBING)) <= PLUMBING_CAP
    assert lines_of(ROOT / "data/shapes.py") <= SHAPES_CAP


def changed_lines(child):
    command = ["diff", FAMILY[child][0], child]
    diff = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    return sum(line.startswith(("<", ">")) for line in diff)


@pytest.mark.parametrize("name", FAMILY)
def test_a_child_is_its_parent_plus_the_idea(name):
    assert 0 < changed_lines(name) <= FAMILY[name][1]
    assert re.search(r"# new in [\w-]+: \w", (ROOT / name).read_text())


def test_dpo_ln_is_dpo_on_other_log_probs():
    dpo, dpo_ln = (slices(ROOT / name) for name in ("dpo.py", "dpo_ln.py"))
    assert dpo.keys() ^ dpo_ln.keys() == {"pair_logprobs", "pair_mean_logprobs"}


def test_readme_says_how_much_is_changed():
    text = (ROOT / "README.md").read_text()
    said = re.findall(r"^\| \[(\w+\.py)\].* \| \[?(\w+\.py)\]?, (\d+) changed lines", text, re.MULTILINE)
    assert said == [(name, FAMILY[name][0], str(changed_lines(name))) for name, *_ in said]
    assert {name for name, *_ in said} == FAMILY.keys()
    tree = text[text.index("    sft.py: where") : text.index("| script | lines")]
    parent, drawn = "", []
    for line in re.findall(r".*─ \d+ lines ─.*", tree):  # without a parent of its own: the one above
        found = re.search(r"(?:(\w+\.py) )?─+ (\d+) lines ─+ (\w+\.py)", line)
        parent = found[1] or parent
        drawn.append((found[3], parent, found[2]))
    assert sorted(drawn) == sorted(said)
    assert set(re.findall(r"\w+\.py", tree)) == CAPS.keys() - {"judge.py"}
    first = re.findall(r"`diff (\w+\.py) (\w+\.py)`.{,30}\((\d+) changed lines\)", text)
    assert first and all(FAMILY[child][0] == parent and int(n) == changed_lines(child) for parent, child, n in first)


def test_the_line_counts_of_readme():
    rows = re.findall(r"^\| \[([\w./]+)\]\([\w./]+\) \| ([\d,]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    counts = {name: int(count.replace(",", "")) for name, count in rows}
    assert counts.keys() == CAPS.keys() | {"plumbing/", "plumbing/plain.py"}
    for name, count in counts.items():
        files = PLUMBING if name == "plumbing/" else [ROOT / name]
        assert count == sum(map(lines_of, files)), name


# apart
@pytest.mark.parametrize("path", [*SCRIPTS, *PLUMBING], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_a_script(path):
    assert not {module.split(".")[0] for module in imports(path)} & {script.stem for script in SCRIPTS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_takes_from_plumbing_has_a_plain_meaning(path):
    taken = set().union(*(names for module, names in imports(path).items() if module.split(".")[0] == "plumbing"))
    assert taken and not taken - slices(ROOT / "plumbing/plain.py").keys()


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_a_training_script_does_no_plumbing(path):
    text = path.read_text()
    modules = {
        "signal",
        "hashlib",
        "shutil",
        "subprocess",
        "os",
        "sys",
        "json",
        "torch.distributed",
        "filelock",
        "tqdm",
    }
    assert not modules & imports(path).keys()
    assert not re.search(r"\b(try:|rank\(|world\(|open\(f?\"|os\.)", text)


def test_import_does_nothing(tmp_path):
    # a socket cannot be connected here, and a flag that a script does not know would end it if it were parsed
    names = ", ".join(path.stem for path in SCRIPTS)
    code = f"import socket, sys; socket.socket.connect = None; sys.path.insert(0, sys.argv[1]); import {names}"
    command = [sys.executable, "-B", "-c", code, str(ROOT), "--unknown"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def anchors(page):
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^    .*$", "", page.read_text(), flags=re.M), re.M)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[(.+?)\]\(.+?\)", r"\1", title)).lower().replace(" ", "-") for title in titles
    }


def test_links_lead_somewhere():
    for page in (path for folder in (".", "docs", "benchmark", "data/*") for path in ROOT.glob(f"{folder}/*.md")):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors(found), f"{page}: {target}"


def test_every_benchmark_is_listed():
    text = (ROOT / "benchmark/README.md").read_text()
    names = [path.name for path in (ROOT / "benchmark").iterdir() if path.suffix in (".py", ".sh")]
    assert not [name for name in names if name not in text]
