"""results/ and RESULTS.md: recomputed here by code that shares nothing with tools/report.py."""

import itertools
import json
import math
import re
import statistics
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import aib_envs
import report
import report_agents
import results_page

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
SETS = ("train", "eval-in", "eval-out")


def cells(line):
    """The cells of a line of a table in Markdown."""
    return [cell.strip().replace("\\*", "*") for cell in line.strip().strip("|").split(" | ")]


def tables(page):
    """{heading: [table: list of dicts]} of a page in Markdown."""
    found = {}
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        found[heading] = []
        for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
            head, _, *lines = block.strip().split("\n")
            found[heading].append([dict(zip(cells(head), cells(line), strict=True)) for line in lines])
    return found


PAGE = tables((ROOT / "RESULTS.md").read_text())


def measured(folder):
    """{(task, steps, method): [for each seed, in order: (seed, {set: AER}, {set: better of the last two}, results)]}"""
    found = {}
    for path in sorted(RESULTS.glob(f"{folder}/*/results.json")):
        results = json.loads(path.read_text())
        lines = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        aer = {name: statistics.fmean(itertools.chain(*results["returns"][name])) for name in SETS}
        aer["all sets"] = statistics.fmean(aer.values())
        better = {name: max(aer[name], lines[-2]["aer"][name]) for name in SETS}
        better["all sets"] = statistics.fmean(better.values())
        args = results["args"]
        key = args["env_id"], args["total_timesteps"], results["method"].replace("DMAstar", "DMA*")
        found.setdefault(key, []).append((args["seed"], aer, better, results))
    return {key: sorted(runs, key=lambda run: run[0]) for key, runs in found.items()}


MEASURED = measured("runs")


def interquartile(values):
    values = sorted(values)
    cut = len(values) // 4
    return statistics.fmean(values[cut : len(values) - cut])


def same_cell(cell, values):
    """Is it the interquartile mean and its interval, or the values themselves where there are fewer than five?"""
    shown = [float(number) for number in re.findall(r"-?[\d.]+", cell)]
    if len(values) < 5:
        assert shown == pytest.approx(values, abs=0.0501)
        return
    assert shown[0] == pytest.approx(interquartile(values), abs=0.0501)
    rng = np.random.default_rng(1)
    drawn = np.sort(rng.choice(values, (4000, len(values))), axis=1)
    means = drawn[:, len(values) // 4 : len(values) - len(values) // 4].mean(1)
    spread = max(values) - min(values)
    assert shown[1:] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.06 + 0.05 * spread)


@pytest.mark.parametrize("task", sorted({task for task, _, _ in MEASURED}))
def test_every_cell_of_a_tasks_table(task):
    rows = {(row["method"], row["steps"]): row for row in PAGE[task][0]}
    nothing = rows.pop(("doing nothing", ""))
    own = {(m, f"{steps:,}"): runs for (name, steps, m), runs in MEASURED.items() if name == task}
    assert rows.keys() == own.keys()
    for key, runs in own.items():
        assert int(rows[key]["seeds"]) == len(runs) == len({seed for seed, *_ in runs})
        for name in (*SETS, "all sets"):
            same_cell(rows[key][name], [aer[name] for _, aer, _, _ in runs])
        same_cell(rows[key]["better of the last two"], [better["all sets"] for _, _, better, _ in runs])
        if "worse mode" in rows[key]:
            assert rows[key]["worse mode"].split(", ") == [worse_mode(results) for *_, results in runs]
        if task == "ODE":
            stuck, others = zip(*(stuck_and_others(results) for *_, results in runs), strict=True)
            assert rows[key]["stuck"].split(", ") == [f"{100 * share:.1f} %" for share in stuck]
            assert rows[key]["mean of the others"].split(", ") == [f"{mean:.0f}" for mean in others]
    still = json.loads((RESULTS / "zero_action.json").read_text())[task]
    assert float(nothing["eval-out"]) == pytest.approx(statistics.fmean(still["eval-out"]), abs=0.0501)


def test_every_cell_of_other_settings():
    """The rows with a flag in their name have the runs in results/settings, and no other."""
    rows = [row for table in PAGE["What differs from the paper"] for row in table if "(" in row.get("method", "")]
    runs = [aer for own in measured("settings").values() for _, aer, _, _ in own]
    assert sum(int(row["seeds"]) for row in rows) == len(runs) > 0
    for name in (*SETS, "all sets"):
        shown = sorted(float(value) for row in rows for value in row[name].split(", "))
        assert shown == pytest.approx(sorted(aer[name] for aer in runs), abs=0.0501)


def worse_mode(results):
    binary = "permutation" if "permutation" in results["contexts"]["train"][0] else "inversion"
    own = [context[binary] for context in results["contexts"]["train"]]
    pairs = list(zip(own, map(statistics.fmean, results["returns"]["train"]), strict=True))
    low, high = sorted(statistics.fmean(r for c, r in pairs if c == mode) for mode in set(own))
    bound = 100 if results["args"]["env_id"].startswith("DI") else 1000
    return f"{100 * low / high:.0f} %" if high >= bound / 100 else "-"


def stuck_and_others(results):
    returns = [value for name in SETS for row in results["returns"][name] for value in row]
    free = [value for value in returns if value > 60]
    return 1 - len(free) / len(returns), statistics.fmean(free)


BOUNDS = {"ODE": 200, "WalkerGym": 5000, "HopperGym": 4000}


def scaled(task, method, name):
    bound = 100 if task.startswith("DI") else BOUNDS.get(task, 1000)
    (runs,) = [runs for (one, _, m), runs in MEASURED.items() if (one, m) == (task, method)]
    return [aer[name] / bound for _, aer, _, _ in runs]


def test_every_cell_over_tasks():
    text = (ROOT / "RESULTS.md").read_text()
    named = [line.split(": ")[1].split(", ") for line in re.findall(r"^\*\*.*after .* %.*: (?:.+)\.\*\*$", text, re.M)]
    named = [[task.strip(".*") for task in tasks] for tasks in named]
    assert len(named) == len(PAGE["Over tasks"]) >= 2
    for tasks, rows in zip(named, PAGE["Over tasks"], strict=True):
        for row, name in itertools.product(rows, ("all sets", "eval-out")):
            groups = [scaled(task, row["method"], name) for task in tasks]
            assert row["seeds"] == ", ".join(str(len(group)) for group in groups)
            count = np.lcm.reduce([len(group) for group in groups])
            repeated = sorted(x for group in groups for x in group for _ in range(count // len(group)))
            parts = np.array_split(np.repeat(repeated, 4), 4)  # quarters of equal weight
            middle = np.mean(np.concatenate(parts[1:3]))
            mean = statistics.fmean(map(statistics.fmean, groups))
            assert float(row[f"{name}: IQM"].split()[0]) == pytest.approx(middle, abs=0.00501)
            assert float(row[f"{name}: mean"].split()[0]) == pytest.approx(mean, abs=0.00501)


def methods_of(claim):
    """The two methods of a claim, and the share of the second's returns that the first has to be above."""
    if claim.startswith("DR fails"):
        return "DMA*-SH", "DR", 1 / 0.6
    if claim.startswith("DR does not"):
        return "DR", "DMA*-SH", 0.8
    return *claim.split(" above "), 1.0


def test_verdicts_over_tasks():
    (rows,) = PAGE["Verdicts over tasks"]
    found, verdicts, corrected = [], [], []
    for row, name in itertools.product(rows, ("all sets", "eval-out")):
        one, other, share = methods_of(row["claim"])
        x = [scaled(task, one, name) for task in row["tasks"].split(", ")]
        y = [scaled(task, other, name) for task in row["tasks"].split(", ")]
        assert row["seeds"] == ", ".join(f"{len(own)}/{len(theirs)}" for own, theirs in zip(x, y, strict=True))
        verdict, numbers = row[name].split(": ")
        difference, chance, p, _, holm = re.sub(r"\[.+?\]|< |P |p |,", "", numbers).split()
        means = [statistics.fmean(map(statistics.fmean, own)) for own in (x, y)]
        assert float(difference) == pytest.approx(means[0] - means[1], abs=0.00501)
        pairs = [(own, [share * value for value in theirs]) for own, theirs in zip(x, y, strict=True)]
        found.append([one_sided(pairs), one_sided([(y, x) for x, y in pairs])])
        above = [np.mean([(a > b) + 0.5 * (a == b) for a, b in itertools.product(x, y)]) for x, y in pairs]
        assert float(chance) == pytest.approx(np.mean(above), abs=0.00501)
        assert float(p) == pytest.approx(found[-1][0], abs=0.001)
        verdicts.append(verdict)
        corrected.append(float(holm))
    for column, word in enumerate(("holds", "does not hold")):
        order = sorted(range(len(found)), key=lambda i: found[i][column])
        largest = 0
        for place, i in enumerate(order):  # step down
            largest = max(largest, min(found[i][column] * (len(found) - place), 1))
            assert (verdicts[i] == word) == (largest <= 0.05)
            assert column or corrected[i] == pytest.approx(largest, abs=0.01)


def test_verdicts_in_single_tasks():
    (rows,) = PAGE["Verdicts in single tasks"]
    tasks = list(rows[0])[2:]
    runs = {task: {m: own for (one, _, m), own in MEASURED.items() if one == task} for task in tasks}
    for row, task in itertools.product(rows, tasks):
        one, other, share = methods_of(row["claim"])
        x, y = ([aer[row["set"]] for _, aer, _, _ in runs[task].get(method, ())] for method in (one, other))
        if not row[task]:  # so few ways to deal them out, or the claim is about tasks of the other kind
            assert "DR" in row["claim"] or math.comb(len(x) + len(y), len(x)) < 20
            continue
        found = scipy.stats.mannwhitneyu(x, [share * value for value in y], alternative="greater", method="exact")
        chance, p = row[task].split(", p ")
        assert math.comb(len(x) + len(y), len(x)) >= 20
        assert float(chance) == pytest.approx(found.statistic / len(x) / len(y), abs=0.0051)
        assert float(p) == pytest.approx(found.pvalue, abs=0.00051)


def test_the_table_at_a_glance():
    (rows,) = PAGE["At a glance"]
    shown = {(row["task"], row["steps"]): row for row in rows}
    for (task, steps, method), runs in MEASURED.items():
        if method in report.MAIN:
            aer = interquartile([aer["all sets"] for _, aer, _, _ in runs])
            value, seeds = shown[task, f"{steps:,}"][method].split()
            assert float(value) == pytest.approx(aer, abs=0.501) and seeds == f"({len(runs)})"
    assert sum(float(row["hours"]) for row in PAGE["Hours"][0][:-1]) == pytest.approx(hours(), abs=0.5)


def hours():
    total = 0
    for path in RESULTS.glob("runs/*/metrics.jsonl"):
        total += sum(json.loads(path.read_text().splitlines()[-1])["seconds"].values()) / 3600
    return total


def one_sided(pairs):
    """Exact, by listing all ways to deal out each task's values."""
    ways = {0.0: 1}
    for x, y in pairs:
        both = [*x, *y]
        values = {}
        for chosen in itertools.combinations(range(len(both)), len(x)):
            left = [both[i] for i in chosen]
            right = [both[i] for i in set(range(len(both))) - set(chosen)]
            u = scipy.stats.mannwhitneyu(left, right, method="asymptotic").statistic / len(left) / len(right)
            values[round(u, 6)] = values.get(round(u, 6), 0) + 1
        ways = add(ways, values)
    found = sum(scipy.stats.mannwhitneyu(x, y, method="asymptotic").statistic / len(x) / len(y) for x, y in pairs)
    return sum(n for value, n in ways.items() if value >= found - 1e-4) / sum(ways.values())


def add(ways, values):
    total = {}
    for (a, n), (b, m) in itertools.product(ways.items(), values.items()):
        total[round(a + b, 5)] = total.get(round(a + b, 5), 0) + n * m
    return total


# ------------------------------------------------------- the page ----------------------------------------------------


@pytest.mark.slow
def test_the_page_is_made_from_results_and_its_words_are_true(tmp_path):
    found = results_page.read_results()
    pages = results_page.pages(found, tmp_path)
    assert not found.problems and len(pages) == 3
    for path, text in pages.items():
        assert text == (ROOT / path).read_text(), "python tools/results_page.py"
    shown = {name for text in pages.values() for name in re.findall(r"\((?:results/)?figures/(.+?)\.png\)", text)}
    assert shown == {path.stem for path in tmp_path.iterdir()}
    assert shown == {path.stem for path in (RESULTS / "figures").iterdir()}


def test_results_say_what_made_them_and_are_small():
    found = results_page.read_results()
    for run in [*found.runs, *found.settings, *found.relatives]:
        config = json.loads((run.directory / "config.json").read_text())
        assert re.fullmatch(r"[0-9a-f]{40}", config["commit"]) and config["run"] == run.directory.name
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 2**18 and sum(path.stat().st_size for path in files) < 2**23


def test_all_methods_with_results_are_published():
    """Others count as the reader's own."""
    found = results_page.read_results()
    runs = [*found.runs, *found.relatives, *found.held_out, *found.failed]
    assert {run.method for run in runs} <= set(report.PUBLISHED)
    assert not {run.method for run in found.settings} & set(report.PUBLISHED)


def test_the_benchmark_is_the_papers_thirteen_tasks():
    assert len(report.BENCHMARK) == 13 and set(report.BENCHMARK) < set(aib_envs.TASKS)
    assert {*report.PAPER["AER_aggregated_over_sets_v2"]} < set(report.BENCHMARK)


class Numbers:
    def aer(self, task, method, split="all sets"):
        return {"DR": "15", "DMA*": "71.5"}[method]

    def count(self):
        return "1,300"


def test_placeholders_are_filled():
    assert results_page.fill("{aer DI, DMA*} and {count}, {aer DI, DR, train}", Numbers()) == "71.5 and 1,300, 15"


@pytest.mark.parametrize("wrong", ["{aer DI, Amago}", "{aer}", "{median DI, DR}", "{}x{nothing here}"])
def test_a_placeholder_that_stands_for_nothing_is_named(wrong):
    with pytest.raises(LookupError):
        results_page.fill(wrong, Numbers())


@pytest.mark.parametrize(
    ("words", "true"),
    [
        ("1 < 2 < 3", True),
        ("15, 16 and 17 < 18 19", True),
        ("15, 16 and 18 < 18 19", False),
        ("1,300 < 1,400", True),
        ("-3.5 < -3", True),
        ("2 < 1", False),
        ("holds = holds", True),
        ("holds = undecided", False),
        ("2\n< 3", True),
        ("3\n< 2", False),
        ("2 and never < 3", False),
        ("never < 3", False),
    ],
)
def test_words_that_are_no_longer_true_are_named(words, true):
    problems = []
    assert results_page.check(f"It is.\n<!-- check: {words} -->\nSo.\n", problems) == "It is.\nSo.\n"
    assert (not problems) == true and all(words in problem for problem in problems)


def test_text_stands_under_its_heading(tmp_path, monkeypatch):
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    page = report.Page(tmp_path, "figures")
    page.text("DI", "A table.\n")
    (tmp_path / "text.md").write_text("Before.\n\n## DI\n\nIt has {count}.\n")
    text = results_page.with_text(page, "text.md", Numbers(), [])
    assert text.index("Before.") < text.index("## DI") < text.index("1,300") < text.index("A table.")
    (tmp_path / "text.md").write_text("## ID\n\nText.\n")
    with pytest.raises(LookupError):
        results_page.with_text(page, "text.md", Numbers(), [])


def test_readme_gets_its_table():
    readme = "a\n<!-- results -->\nold\n<!-- end -->\nb\n"
    filled = results_page.fill_readme(readme, [{"task": "DI", "ours": "77"}])
    assert "| DI | 77 |" in filled and "old" not in filled and filled.endswith("<!-- end -->\nb\n")
    assert results_page.fill_readme("no marks", [{"task": "DI"}]) == "no marks"
    rows = results_page.benchmark_table(results_page.read_results()[0])
    assert [row["task"] for row in rows] == report.BENCHMARK
    assert all(0.1 < float(row["hours"].removeprefix("~")) < 24 for row in rows)
    speed = json.loads((RESULTS / "speed_HopperGym.json").read_text())["training"]["DMAstar-SH"]["with_evaluations"]
    assert float(results_page.hours_from_speed("HopperGym")[1:]) == pytest.approx(500_000 / 3600 / speed, abs=0.06)
    readme = (ROOT / "README.md").read_text()
    assert results_page.fill_readme(readme, rows) == readme, "python tools/results_page.py"


def test_adaptation_belongs_to_a_length(tmp_path):
    run = next(run for run in results_page.read_results()[0] if run.task == "DI")
    rewards, _ = results_page.adaptation_of(run)
    assert rewards["switch"].shape == (100,) and rewards["modes"].shape == (2,)
    run.steps += 1  # it has been trained for longer
    assert results_page.adaptation_of(run) is None


def test_what_a_change_costs_and_how_far_z_goes():
    runs = results_page.read_results()[0]
    lost, moved = [], []
    for run in (run for run in runs if (run.task, run.method) == ("DI-Perm", "DMA")):
        found = json.loads((run.directory / "adaptation.json").read_text())
        rewards = found["rewards"]["switch"]
        worst = min(statistics.fmean(rewards[t : t + 5]) for t in range(50, 96))
        lost.append(round(100 - 100 * worst / statistics.fmean(rewards[38:50])))
        moved.append(round(100 * found["moved"]["switch"][55]))  # after five steps of the second half
    values = results_page.Values(runs)
    assert values.lost("DI-Perm", "DMA") == results_page.listed(list(map(str, lost)))
    assert values.moved("DI-Perm", "DMA", "5") == results_page.listed(list(map(str, moved)))
    assert values.lost("DI-Perm", "DMA", "usual") != values.lost("DI-Perm", "DMA")


def test_a_z_that_is_not_wrong_earns_what_the_results_say():
    agents = results_page.of_agents("wrong_z.json")
    runs = {run.name: run for run in results_page.read_results()[0]}
    both = agents.keys() & runs.keys()
    assert both
    for name in both:
        first = np.mean([rollouts[0] for split in aib_envs.SPLITS for rollouts in runs[name].returns[split]])
        assert agents[name]["noise"]["0"] == pytest.approx(first, abs=0.06)
        kept = agents[name]["window"]
        assert agents[name]["noise"]["0"] == agents[name]["z of"]["own context"] == kept[max(kept, key=int)]
    acting = results_page.of_agents("actions.json")
    for name in acting.keys() & runs.keys():
        first = [rollouts[0] for split in aib_envs.SPLITS for rollouts in runs[name].returns[split]]
        assert np.allclose(acting[name]["returns"]["mean"], first, atol=0.06)
    rows = results_page.wrong_z_table(agents)
    assert len(rows) == len(agents) and all(row["return"] > (row["z of other mode"] or 0) for row in rows)


def test_adaptation_of_an_agent_with_other_steps_than_its_run_is_not_kept(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"run": "DI__DR__1__1"}))
    (tmp_path / "agent.pt").touch()
    agent = types.SimpleNamespace(task="DI", method="DR", steps=100, agent=object())
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    monkeypatch.setattr(report_agents, "load", lambda path: agent)
    monkeypatch.setattr(report_agents, "adaptation", lambda agent: ({"usual": np.ones(2), "modes": 0}, {}))
    for steps in (50, 100):
        results_page.roll_out(
            [types.SimpleNamespace(name="DI__DR__1__1", task="DI", steps=steps, directory=tmp_path)], [tmp_path]
        )
        assert (tmp_path / "adaptation.json").exists() == (steps == 100)


def test_an_agent_is_rolled_out_once_and_again_when_it_has_been_trained_on(tmp_path, monkeypatch):
    directory = tmp_path / "runs" / "one"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"run": "DI__DMAstar__1__1"}))
    (directory / "agent.pt").touch()
    calls = []
    trained = types.SimpleNamespace(task="DI-Friction", method="DMA*", steps=100)
    trained.agent = types.SimpleNamespace(encoder=object(), log_alpha=0)
    found = {"noise": {0: np.full((60, 1), 7.0)}}
    actions = {"mean": types.SimpleNamespace(returns=np.zeros(60))}
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    monkeypatch.setattr(report_agents, "load", lambda path: trained)
    monkeypatch.setattr(report_agents, "wrong_z", lambda agent: calls.append("z") or found)
    monkeypatch.setattr(report_agents, "kinds_of_actions", lambda agent: calls.append("actions") or actions)
    for steps, expected in ((100, ["z", "actions"]), (100, []), (200, ["z", "actions"])):
        trained.steps = steps
        results_page.roll_out([], [tmp_path / "runs"])
        assert calls == expected
        calls.clear()
    (own,) = results_page.of_agents("wrong_z.json").values()
    assert own["steps"] == 200 and own["noise"] == {"0": 7.0}
    del trained.agent.encoder, trained.agent.log_alpha  # an agent that plans
    trained.steps = 300
    results_page.roll_out([], [tmp_path / "runs"])
    assert not calls
