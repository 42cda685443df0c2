"""What `python -m plumbing.plain drpo.py` writes: a script with plain.py's functions in place of its imports from plumbing/."""

import ast
import os
import re
import sys

from plumbing import ROOT

OWN = ("from plumbing", "from data.")  # whose names the copy defines itself


def parsed(name):
    """Of a file: text; import lines -> names they bind; names of definitions -> their text and the names it uses."""
    with open(name, encoding="utf-8") as file:
        text = file.read()
    imports, definitions = {}, {}
    for node in ast.parse(text).body:
        first = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
        source = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports[source] = {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign):
            name = node.targets[0].id if isinstance(node, ast.Assign) else node.name
            definitions[name] = source, {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return text, imports, definitions


def one_file(path):
    """The text of the copy: header, imports, the functions that the script imports and those they need, its own story."""
    text, imports, _ = parsed(path)
    known, lines = {}, dict(imports)
    for name in ("plumbing/plain.py", "data/tldr_mini/rubric.py"):  # the rubric is plain as it is
        _, more_imports, definitions = parsed(os.path.join(ROOT, name))
        known |= definitions
        lines = more_imports | lines
    wanted = {name for line in imports if line.startswith(OWN) for name in imports[line]}
    while more := set().union(*(known[name][1] for name in wanted)) & known.keys() - wanted:
        wanted |= more
    used = set().union(*(known[name][1] for name in wanted))
    groups = {True: [], False: []}  # of the standard library or not, in the order that linters like
    for line in sorted(lines, key=lambda line: (line.startswith("from"), line.split()[1])):
        if not line.startswith(OWN) and (line in imports or lines[line] & used):
            groups[line.split()[1].split(".")[0] in sys.stdlib_module_names].append(line)
    first_import, first_blank = re.search(r"\n(from|import) ", text).start(), text.index("\n\n\n")
    parts = [known[name][0] for name in known if name in wanted]
    parts[0] = f"# in place of plumbing/, by python -m plumbing.plain {os.path.basename(path)}\n{parts[0]}"
    head = "\n".join([text[:first_import], *groups[True], "", *groups[False]])
    return "\n\n\n".join([head, *parts, text[first_blank:].strip("\n")]) + "\n"
