"""README.md's figures are those of results/, its commands and code those of the repository."""

import json
import re
from pathlib import Path

import pytest

import aib_envs
import readme
import report

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "README.md").read_text()


def runs_and_agents():
    return report.read_runs([ROOT / "results" / "runs"])[0], json.loads((ROOT / "results" / "agents.json").read_text())


def test_every_table_is_made_from_results():
    assert readme.fill(PAGE, readme.parts(*runs_and_agents())) == PAGE


def test_every_figure_that_the_page_shows_is_there():
    shown = re.findall(r"!\[.+\]\((.+?)\)", PAGE)
    assert len(shown) > 3 and all((ROOT / path).stat().st_size < 2**20 for path in shown)
    drawn = {f"results/figures/{path.name}" for path in (ROOT / "results" / "figures").iterdir()}
    assert set(shown) == drawn


def test_results_are_of_one_length_and_say_what_made_them():
    runs, problems = report.read_runs([ROOT / "results" / "runs"])
    assert {run.steps for run in runs} == {50_000} and not problems
    assert all(re.fullmatch(r"[0-9a-f]{40}", config["commit"]) for config in map(config_of, runs))
    assert len({config_of(run)["commit"] for run in runs}) == 1


def config_of(run):
    return json.loads((run.directory / "config.json").read_text())


def test_the_equations_code_is_in_the_script():
    code = re.findall(r"^\| .+ \| `(.+)` \|$", PAGE, re.MULTILINE)
    lines = [line.partition("  # ")[0].strip() for line in (ROOT / "dmash_sac.py").read_text().splitlines()]
    assert len(code) == 8 and set(code) <= set(lines)


def test_fill():
    page = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n"
    filled = "a\n<!-- one -->\nnew\n<!-- end -->\nb\n<!-- two -->\n2\n<!-- end -->\n"
    assert readme.fill(page, {"one": "new\n", "two": "2\n"}) == filled
    assert readme.fill(filled, {"one": "new\n", "two": "2\n"}) == filled
    with pytest.raises(LookupError):
        readme.fill(page, {"one": "new\n"})
    with pytest.raises(LookupError):
        readme.fill(page, {"one": "new\n", "two": "2\n", "three": "3\n"})


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        ([3, 4, 5], [0, 1, 2], "holds"),
        ([0, 1, 2], [3, 4, 5], "does not hold"),
        ([3, 4, 1.5], [0, 1, 2], "undecided: the seeds overlap"),
        ([100, 101], [0, 1], "too few seeds to say"),
        ([100, 101], [0, 1, 2, 3], "too few seeds to say"),  # p = 1 / 15
        ([100, 101], [0, 1, 2, 3, 4], "holds"),  # p = 1 / 21
    ],
)
def test_verdicts(x, y, said):
    assert readme.verdict(x, y) == said


def test_claims_are_about_the_right_tasks():
    runs, _ = runs_and_agents()
    rows = readme.claims_table(runs)
    fails = [row["task"] for row in rows if row["the paper's claim"].startswith("DR fails")]
    does_not = [row["task"] for row in rows if row["the paper's claim"].startswith("DR does not")]
    assert fails and not any(aib_envs.get_task(task).overlap for task in fails)
    assert does_not and all(aib_envs.get_task(task).overlap for task in does_not)
