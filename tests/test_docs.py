"""The commands, links and quotes of README.md and docs/: they run, exist, and stand in the scripts."""

import re
import shlex
from pathlib import Path

import learning
import pytest

import aib_run

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    (page.name, command.strip())
    for page in PAGES
    for command in re.findall(r"(?:^ {4,}|`)(python (?:relatives/)?\w+\.py [^`\n]*)", page.read_text(), re.MULTILINE)
    if "film_sac" not in command  # the reader's own
]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_names_a_script_and_flags_that_are_there(page, command):
    _, script, *flags = shlex.split(command)
    if "runs/<directory>" in flags:  # a place for the reader's own
        flags = [flag for flag in flags if flag not in ("--resume", "--eval-only", "runs/<directory>")]
    aib_run.read_flags(learning.script(script).Args, flags)


def test_there_are_commands():
    assert len(COMMANDS) > 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_diffs_of_the_readme_are_in_the_scripts():
    lines = {
        sign: (ROOT / name).read_text().splitlines() for sign, name in (("-", "dma_sac.py"), ("+", "dmash_sac.py"))
    }
    for block in re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        for line in block.splitlines():
            for sign in "-+" if line[0] == " " else line[0]:
                assert line[1:] in lines[sign], line


def test_the_code_of_the_method_page_is_in_the_script():
    script = {line.strip() for line in (ROOT / "dmash_sac.py").read_text().splitlines()}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/method.md").read_text(), re.DOTALL):
        assert {line.strip() for line in block.splitlines() if line.strip()} <= script


def test_the_samples_of_the_benchmark_page_run_and_print_what_it_says(capsys):
    text = (ROOT / "docs/benchmark.md").read_text()
    samples = re.findall(r"```python\n(.*?)```\n\n(.*?)\n\n", text, re.DOTALL)
    assert len(samples) == 2
    printed = []
    for code, _ in samples:
        exec(code, {})
        printed += re.findall(r"\d+\.\d+", capsys.readouterr().out)
    said = re.findall(r"\d+\.\d+", samples[0][1])
    assert [f"{float(number):.1f}" for number in printed] == said and len(said) == 5
