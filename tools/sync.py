"""Keeps the copies in the algorithm scripts the same.

    python tools/sync.py dmash_sac.py    # after editing it: writes what it shares with the other scripts into them
    python tools/sync.py --check         # says what is not the same, and how to mend it; exit code 1 then

Each script is to be read from top to bottom, so what several of them need stands in each of them. Top-level definitions
(functions, classes, constants) of the same name are the same to the letter, with the comments directly above them,
unless the lists below say otherwise.
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Every script has its own:
OWN = {
    "Args": "each method has its own flags",
    "method_name": "each method has its own name",
    "MLP": "how the context enters a network",
    "Agent": "the method itself",
}
# These scripts have a version of their own, which they share; all others share another one:
GROUPS = {
    "Actor": (["dr_sac.py"], "its policy is told nothing about the context"),
    "ReplayBuffer": (["dr_sac.py", "da_sac.py"], "without an encoder there is no window"),
    "make_envs": (["dr_sac.py"], "whether the true context is seen is a flag"),
}
ALONE = {
    ("make_envs", "da_sac.py"): "it always sees the true context",
    ("Encoder", "rsac.py"): "it sees rewards, too",
    ("ReplayBuffer", "rsac.py"): "its window has rewards, too",
}


def scripts():
    """The algorithm scripts: what in the root imports aib_run, but aib_run.py itself."""
    return [path for path in sorted(ROOT.glob("*.py")) if "\nimport aib_run\n" in path.read_text()]


def definitions(source):
    """{name: (first line, last line)} of top-level definitions, counted from 0, comments directly above included."""
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            start = node.lineno - 1
        else:
            continue
        while start > 0 and lines[start - 1].startswith("#"):
            start -= 1
        found[name] = (start, node.end_lineno)
    return found


def group_of(name, script):
    """Definitions of the same name and group are the same."""
    if name in OWN or (name, script) in ALONE:
        return script
    return "special" if script in GROUPS.get(name, ((), ""))[0] else "all"


def shared(one, other):
    """Names that two scripts share, with the text in each: {name: (text in one, text in other)}."""
    texts = [path.read_text() for path in (one, other)]
    found = [definitions(text) for text in texts]
    lines = [text.splitlines() for text in texts]
    return {
        name: tuple("\n".join(lines[i][slice(*found[i][name])]) for i in (0, 1))
        for name in found[0]
        if name in found[1] and group_of(name, one.name) == group_of(name, other.name)
    }


def copy_into(other, one):
    """Writes what `one` shares with `other` into `other`. Returns the names of what was different."""
    changed = []
    for name, (ours, theirs) in shared(one, other).items():
        if ours != theirs:
            source = other.read_text()
            start, end = definitions(source)[name]
            lines = source.splitlines()
            other.write_text("\n".join([*lines[:start], *ours.splitlines(), *lines[end:]]) + "\n")
            changed.append(name)
    return changed


def check():
    """One line for each pair of scripts that differ where they should not."""
    problems = []
    paths = scripts()
    for i, one in enumerate(paths):
        for other in paths[i + 1 :]:
            names = [name for name, (a, b) in shared(one, other).items() if a != b]
            if names:
                problems.append(f"{one.name} and {other.name} differ in {', '.join(names)}")
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", nargs="?", help="the script that was edited")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    if args.check == bool(args.script):
        parser.error("give the script that was edited, or --check")
    if args.check:
        problems = check()
        if problems:
            print("\n".join(problems))
            print("Edit one and run: python tools/sync.py THAT_SCRIPT. To keep both, see the top of tools/sync.py")
        sys.exit(bool(problems))
    one = ROOT / Path(args.script).name
    if one not in scripts():
        parser.error(f"{one.name} is none of the scripts: {', '.join(path.name for path in scripts())}")
    for other in scripts():
        if other != one and (changed := copy_into(other, one)):
            print(f"{other.name}: {', '.join(changed)}")


if __name__ == "__main__":
    main()
