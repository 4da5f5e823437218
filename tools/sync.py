"""Keeps the copies in the algorithm scripts the same.

    python tools/sync.py dmash_sac.py    # after editing it: writes what it shares with the other scripts into them
    python tools/sync.py --check         # changes nothing: says what differs and the command that mends it

What only another script has so, while this one has it as the rest, was edited there and is left: sync from there, or
name it to overwrite it, as in `python tools/sync.py dmash_sac.py Encoder`.

Each script is to be read from top to bottom, so what several of them need stands in each of them. Top-level definitions
(functions, classes, constants) of the same name are the same to the letter, with the comments directly above them,
except for what the lists below name. A script that is not in SCRIPTS, such as one of your own, is left alone.
"""

import argparse
import ast
import collections
import difflib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("dr_sac.py", "da_sac.py", "dma_sac.py", "dmah_sac.py", "dmash_sac.py", "rsac.py")

# Every script has its own:
OWN = {
    "Args": "each method has its own flags",
    "method_name": "each method has its own name",
    "MLP": "how the context enters a network",
    "Agent": "the method itself",
}
# These scripts share a version that is not the others':
VERSIONS = {
    "Actor": [{"dr_sac.py"}],  # its policy is told nothing about the context
    "Encoder": [{"rsac.py"}],  # it sees rewards, too
    "ReplayBuffer": [{"dr_sac.py", "da_sac.py"}, {"rsac.py"}],  # no window; a window with rewards
    "make_envs": [{"dr_sac.py"}, {"da_sac.py"}],  # who sees the true context: with a flag, always, never
}


def version(name, script):
    """Definitions of the same name and version are the same."""
    if name in OWN:
        return script
    for i, group in enumerate(VERSIONS.get(name, ())):
        if script in group:
            return i
    return "common"


def places(source):
    """{name: (first line, last line + 1)} of top-level definitions, with the comments directly above them."""
    lines = source.split("\n")
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = node.name
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            name = ast.unparse(target)
            start = node.lineno - 1
        else:
            continue
        while start > 0 and lines[start - 1].startswith("#"):
            start -= 1
        found[name] = (start, node.end_lineno)
    return found


def definitions(script):
    """{(name, version): text} of a script."""
    source = (ROOT / script).read_text()
    lines = source.split("\n")
    return {(name, version(name, script)): "\n".join(lines[i:j]) for name, (i, j) in places(source).items()}


def scripts():
    return [script for script in SCRIPTS if (ROOT / script).exists()]


def all_holders():
    """{(name, version): {text: [scripts that have it so]}}"""
    holders = collections.defaultdict(lambda: collections.defaultdict(list))
    for script in scripts():
        for key, text in definitions(script).items():
            holders[key][text].append(script)
    return holders


def check():
    """What differs and how to mend it, as lines; none if nothing does."""
    problems = []
    commands = []
    for (name, _), texts in all_holders().items():
        if len(texts) == 1:
            continue
        groups = sorted(texts.values(), key=len)  # the fewest first: they have probably been edited
        candidates = [script for group in groups if len(group) == len(groups[0]) for script in group]
        in_git = changed_in_git()
        edited = [script for group in groups for script in group if script in in_git] or candidates
        problems.append(f"{name} is not the same in " + " and in ".join(", ".join(group) for group in groups))
        commands += [f"python tools/sync.py {script}" for script in edited]
    if problems:
        problems.append("What a script has different on purpose belongs into VERSIONS in tools/sync.py. Else:")
        commands = list(dict.fromkeys(commands))
        problems.append("Run the line of the script that you edited:" if len(commands) > 1 else "Run:")
    return problems + commands


def changed_in_git():
    """The scripts that differ from git's last commit; none if git does not know."""
    command = ["git", "-C", str(ROOT), "diff", "--name-only", "--relative", "HEAD", "--", *scripts()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return done.stdout.split()


def copy_from(script, names=()):
    """Writes what `script` shares with the others, or of that only `names`, into them. Returns what was written,
    {(name, old text, new text): [scripts]}, and what was left since it was edited there, [(name, script)]."""
    written = collections.defaultdict(list)
    left = []
    for (name, _), texts in all_holders().items():
        new = next((text for text, having in texts.items() if script in having), None)
        if new is None or (names and name not in names):
            continue
        for old, others in texts.items():
            if old == new:
                continue
            if not names and len(others) == 1 < len(texts[new]):
                left.append((name, others[0]))
                continue
            for other in others:
                source = (ROOT / other).read_text()
                start, end = places(source)[name]
                lines = source.split("\n")
                (ROOT / other).write_text("\n".join([*lines[:start], new, *lines[end:]]))
                written[name, old, new].append(other)
    return written, left


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", nargs="?", help="the script that was edited")
    parser.add_argument("names", nargs="*", help="of what is to be written, whatever the others have")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    if args.check == bool(args.script):
        parser.error("give the script that was edited, or --check")
    if args.check:
        sys.exit("\n".join(check()) or 0)

    script = Path(args.script).name
    if script not in scripts():
        parser.error(
            f"{script} is none of {', '.join(scripts())}. To keep it like them, add it to SCRIPTS in {__file__}"
        )
    known = {name for name, _ in definitions(script)}
    if set(args.names) - known:
        parser.error(f"{script} has no {', '.join(sorted(set(args.names) - known))}")
    written, left = copy_from(script, args.names)
    for (name, old, new), others in written.items():
        print(f"{name}: written into {', '.join(others)}")
        diff = list(difflib.unified_diff(old.split("\n"), new.split("\n"), n=0, lineterm=""))
        print("\n".join(line for line in diff[2:] if not line.startswith("@@")))  # also what has been overwritten
    for name, other in left:
        print(f"{name}: left in {other}, where it was edited: python tools/sync.py {other}")


if __name__ == "__main__":
    main()
