"""Pins what lies below the pins of pyproject.toml: `python tools/lock.py` asks uv for today's newest versions that go
together on every Python and system that pyproject.toml allows, and writes them to constraints.txt (for pip) and to
constraint-dependencies in pyproject.toml (for uv). Left out is what torch brings for CUDA: torch pins that itself."""

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# What lies below the pins of pyproject.toml. `python tools/lock.py` makes it anew (it needs uv).\n"
CUDA = re.compile(r"(nvidia|cuda)-|triton\b")


def name(requirement):
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def compile_pins():
    """Returns the lines of constraints.txt, sorted by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = [line for line in project["dependencies"] if name(line) != "labmaze"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines if name(line) != "dmash"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in.txt").write_text("\n".join(ours + extras))
        (Path(folder) / "without.txt").write_text("labmaze; python_version < '3.13'")
        command = ["uv", "pip", "compile", "--quiet", "--no-config", "--universal", "--fork-strategy=fewest"]
        command += ["--python-version=3.11", "--no-header", "--no-annotate", "--no-emit-index-url"]
        command += ["--override=without.txt", "in.txt"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    known = {name(line) for line in ours}
    return [line for line in result.stdout.splitlines() if name(line) not in known and not CUDA.match(line)]


def main():
    pins = compile_pins()
    (ROOT / "constraints.txt").write_text(HEADER + "\n".join(pins) + "\n")
    pyproject = (ROOT / "pyproject.toml").read_text()
    lines = "".join(f'    "{line}",\n' for line in pins)
    pattern = r"(?<=\nconstraint-dependencies = \[\n).*?(?=\]\n)"
    (ROOT / "pyproject.toml").write_text(re.sub(pattern, lambda _: lines, pyproject, flags=re.DOTALL))
    print(f"{len(pins)} pins in constraints.txt and pyproject.toml")


if __name__ == "__main__":
    main()
