"""Makes RESULTS.md, results/agents.md, results/relatives.md and results/figures from what is in results/.

    python tools/report.py --collect results/runs runs/    puts finished runs into results/
    python tools/results_page.py                           the pages, and the table in README.md
    python tools/results_page.py --agents runs/            the same, after agents that are new have been rolled out

RESULTS.md is tools/report.py's report on results/runs, with a table of results/settings: that has runs with a flag of
another value. agents.md is about single trained agents, relatives.md about relatives/. Under their headings stand the
paragraphs of results/text.md, text_agents.md and text_relatives.md. Numbers in these are placeholders such as
{aer DI, DMA*-SH, eval-out}, see `Values`; and comments such as
<!-- check: {aer DI, DMA*} < {aer DI, DMA*-SH} --> tell when words are no longer true, see `check`.
"""

import argparse
import itertools
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import aib_envs
import report
import report_agents
import stats
from report import OURS, RESULTS, SPLITS

SHOWN = "DI", "Cartpole", "Cheetah"  # tasks whose figures of adaptation are in RESULTS.md
ADAPTING = "Concat", "DMA", "DMA*", OURS  # whose adaptation is in the table
LESS = "better of the last two", "worse mode"  # columns that are not for relatives


# --------------------------------------------- Numbers in hand-written text -----------------------------------------


def listed(words):
    """a, b and c"""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


class Values:
    """What the placeholders of results/text.md stand for. Each method is one: {name argument, argument, ...}. Numbers
    of a task are of the length for which most methods have runs."""

    def __init__(self, runs, relatives=()):
        self.all = runs
        self.relatives = relatives

    def own(self, task, method):
        runs = [*report.main_runs(self.all, task), *(run for run in self.relatives if run.task == task)]
        runs = [run for run in runs if not run.held_out]
        found = [run for run in runs if run.method == method]
        if not found:
            raise LookupError(f"no run of {method} on {task}")
        return found

    def aer(self, task, method, split="all sets"):
        return f"{stats.iqm(report.aers(self.own(task, method), split)):.0f}"

    def seeds(self, task, method, split="all sets"):
        """Of each seed."""
        return listed([f"{run.aer(split):.0f}" for run in self.own(task, method)])

    def share(self, task, method, split="all sets"):
        """Of what DMA*-SH earns, in percent."""
        ours = np.mean(report.aers(self.own(task, OURS), split))
        return f"{100 * np.mean(report.aers(self.own(task, method), split)) / ours:.0f}"

    def better(self, task, method):
        """The better of the last two evaluations, all sets."""
        return f"{stats.iqm([run.better('all sets') for run in self.own(task, method)]):.0f}"

    def steps(self, task):
        return f"{report.main_runs(self.all, task)[0].steps:,}"

    def nothing(self, task, split="all sets"):
        """What doing nothing earns."""
        found = report.doing_nothing(task)
        return f"{np.mean([found[one] for one in (SPLITS if split == 'all sets' else [split])]):.0f}"

    def paper(self, task, method):
        return str(report.PAPER["AER_aggregated_over_sets_v2"][task][method])

    def block(self, kind):
        """The comparison over tasks of a kind that the text speaks of: of those with DA the one over most tasks."""
        return next(block for block in report.blocks(self.all) if block[0] == kind and "DA" in block[2])

    def tasks(self, kind):
        return listed(self.block(kind)[3])

    def pooled(self, kind, method, split, statistic):
        _, runs, _, tasks = self.block(kind)
        groups = report.groups_of(runs, method, tasks, lambda run: run.scaled(split))
        return f"{float(statistic(*groups)):.2f}"

    def score(self, kind, method, split="all sets"):
        """Scaled AER, interquartile mean over tasks and seeds."""
        return self.pooled(kind, method, split, stats.pooled_iqm)

    def mean(self, kind, method, split="all sets"):
        """The same, as plain mean."""
        return self.pooled(kind, method, split, stats.pooled_mean)

    def paper_score(self, kind, method, split="all sets"):
        return report.paper_score(kind, method, split)

    def claim(self, one, other, kind, split="all sets"):
        """The row of the table of verdicts over tasks of a kind."""
        name = next(str(claim) for claim in report.CLAIMS if (claim.one, claim.other) == (one, other))
        found = {(row["claim"], row["kind"], row["set"]): row for row in report.pooled_claims(self.all)}
        return found[name, kind, split]

    def verdict(self, *claim):
        return self.claim(*claim)["verdict"]

    def holm(self, *claim):
        """The corrected p-value, and how many questions were asked."""
        row = self.claim(*claim)
        name = next(name for name in row if name.startswith("p, Holm"))
        return f"{row[name]}, one of {name.removeprefix('p, Holm of ')} questions"

    def stuck(self, method):
        """Shares of stuck rollouts on ODE, in percent, of each seed."""
        return listed([f"{100 * report.stuck(run)[0]:.0f}" for run in self.own("ODE", method)])

    def unstuck(self, method):
        """Mean return of the other rollouts on ODE, of each seed."""
        return listed([f"{report.stuck(run)[1]:.0f}" for run in self.own("ODE", method)])

    def one_mode(self, task, method):
        """In how many runs the worse mode earns less than half of the better one."""
        shares = [run.worse_mode() for run in self.own(task, method)]
        return f"{sum(share is not None and share < 0.5 for share in shares)} of {len(shares)}"

    def back(self, task, method):
        """After how many steps the reward is back at 90 % after a change, of each seed that has been rolled out."""
        found = [both[0] for run in self.own(task, method) if (both := adaptation_of(run))]
        rows = [report_agents.recovery_rows(task, "", rewards)[0] for rewards in found]
        return listed([in_table(row["steps to 90 %"]) for row in rows])

    def lost(self, task, method, kind="switch"):
        """What share of the reward a change costs at worst, in percent, of each seed that masters both modes and has
        been rolled out; `usual`: without a change."""
        found = [both[0] for run in self.own(task, method) if (both := adaptation_of(run))]
        found = [rewards for rewards in found if report_agents.masters_both(rewards["modes"])]
        levels = [report_agents.recovery(rewards[kind])[:2] for rewards in found]
        return listed([f"{100 - 100 * lowest / level:.0f}" for level, lowest in levels])

    def moved(self, task, method, steps):
        """How far z has gone from the old to the new context after so many steps with changed actuators, in percent, of
        each seed. The window of the first step after a change has nothing of it yet."""
        ways = [adaptation_of(run)[1]["switch"] for run in self.own(task, method)]
        return listed([f"{100 * way[len(way) // 2 + int(steps)]:.0f}" for way in ways])

    def decided(self):
        """How many claims about single tasks hold, or do not hold."""
        rows = [row for task in report.tasks_of(self.all) for row in report.task_claims(self.all, task)]
        return str(sum(row["verdict"] in ("holds", "does not hold") for row in rows))

    def wrong_z(self, task, method, part, key):
        """The mean return in all contexts when z is wrong, as in {wrong_z DI, DMA*-SH, noise, 1}, of each agent."""
        own = [
            agent for agent in of_agents("wrong_z.json").values() if (agent["task"], agent["method"]) == (task, method)
        ]
        return listed([f"{agent[part][key]:.0f}" for agent in own])

    def acts(self, task, method, kind):
        """The mean return in all contexts with a kind of actions, as in {acts Cartpole, DMA*-SH, noisy}, by agent."""
        own = [
            agent for agent in of_agents("actions.json").values() if (agent["task"], agent["method"]) == (task, method)
        ]
        return listed([f"{np.mean(agent['returns'][kind]):.0f}" for agent in own])

    def hours(self, *where):
        """Of all runs, or of one run on average: {hours task, method}."""
        if where:
            return f"{np.mean([run.hours() for run in self.own(*where)]):.1f}"
        return f"{sum(run.hours() for run in self.all):.0f}"

    def hours_of_relatives(self):
        return f"{sum(run.hours() for run in self.relatives):.0f}"

    def runs(self):
        return str(len(self.all))

    def count(self):
        """Of tasks."""
        return str(len(report.tasks_of(self.all)))


def fill(text, values):
    """`text` with its placeholders filled. Raises LookupError, which names it, for one that stands for nothing."""

    def replace(match):
        name, _, arguments = match[1].partition(" ")
        try:
            found = getattr(values, name)(*[word.strip() for word in arguments.split(",") if word.strip()])
        except (AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
            raise LookupError(f"{match[0]} stands for nothing ({error})") from error
        return found

    return re.sub(r"\{([^{}]+)\}", replace, text).replace("DMA*", "DMA\\*")


def check(text, problems):
    """`text` without its comments <!-- check: 3 < 4.5 < 7 and 8 -->, which keep the words around them honest: all
    numbers left of a < must be below all right of it. (= compares words.) One that is no longer true is named."""

    def judge(match):
        words = " ".join(match[1].split())
        sides = re.split(" < | = ", words)
        try:
            if " = " in words:
                true = len(set(sides)) == 1
            else:
                sides = [[float(x.replace(",", "")) for x in re.split(",? and |, | ", side)] for side in sides]
                true = all(max(low) < min(high) for low, high in itertools.pairwise(sides))
        except ValueError:  # a word where a number should be
            true = False
        if not true:
            problems.append(f"no longer true: {match[1]}")
        return ""

    return re.sub(r"<!-- check: (.+?) -->\n?", judge, text, flags=re.DOTALL)


def paragraphs(text):
    """{heading: what stands below it}; "" is the key of what comes before the first heading."""
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    found = {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}
    return {heading: part.strip() + "\n" for heading, part in found.items()}


# -------------------------------------------------- Adaptation of agents --------------------------------------------


def roll_out(runs, directories):
    """Rolls the agents in `directories` out that have not been yet, or have been trained on since: the runs' files
    adaptation.json, and wrong_z.json and actions.json in results/."""
    problems = []
    found = [path for path in report.find_runs(directories, problems) if (path / "agent.pt").exists()]
    report.tell(problems)
    names = {path: json.loads((path / "config.json").read_text())["run"] for path in found}
    agents = {name: report_agents.load(path) for path, name in names.items()}
    agents = {name: agent for name, agent in agents.items() if not report_agents.has_several_signs(agent.task)}
    rounded = lambda part: {kind: np.round(x, 3).tolist() for kind, x in part.items()}
    for run in runs:
        agent = agents.get(run.name)
        if not report.binary(run.task) or not agent or agent.steps != run.steps or adaptation_of(run):
            continue
        print(f"{run.name}: rolls out its agent", file=sys.stderr)
        rewards, moved = report_agents.adaptation(agent)
        rewards.pop("modes")
        found = {"steps": run.steps, "rewards": rounded(rewards), "moved": rounded(moved)}
        report.write(run.directory / "adaptation.json", json.dumps(found) + "\n")
    known = of_agents("wrong_z.json")
    for name, agent in agents.items():
        if known.get(name, {}).get("steps") == agent.steps or not report_agents.encoder_of(agent.agent):
            continue
        print(f"{name}: is told a wrong z", file=sys.stderr)
        found = report_agents.wrong_z(agent)
        means = {part: {key: round(x.mean(), 1) for key, x in group.items()} for part, group in found.items()}
        known[name] = {"task": agent.task, "method": agent.method, "steps": agent.steps} | means
        report.write(RESULTS / "wrong_z.json", json.dumps(known, indent=1) + "\n")
    known = of_agents("actions.json")
    for name, agent in agents.items():
        if known.get(name, {}).get("steps") == agent.steps or not hasattr(agent.agent, "log_alpha"):
            continue
        print(f"{name}: acts in other ways", file=sys.stderr)
        found = report_agents.kinds_of_actions(agent)
        known[name] = {"task": agent.task, "method": agent.method, "steps": agent.steps}
        known[name]["returns"] = {kind: np.round(episodes.returns, 1).tolist() for kind, episodes in found.items()}
        if report_agents.encoder_of(agent.agent) and report.binary(agent.task):
            known[name]["calm"] = report_agents.calm_rows(agent, report_agents.calm_windows(agent, found))
        report.write(RESULTS / "actions.json", json.dumps(known) + "\n")


def adaptation_of(run):
    """(rewards, moved) of a run's adaptation.json, as report_agents.adaptation gives them; None if there is none of its
    length."""
    path = run.directory / "adaptation.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("steps") != run.steps:
        return None
    as_arrays = lambda part: {kind: np.array(x) for kind, x in part.items()}
    rewards = as_arrays(found["rewards"])
    rewards["modes"] = run.mode_rewards()
    return rewards, as_arrays(found["moved"])


def in_table(steps):
    """Steps to 90 % in words as short as a table needs."""
    return str(steps).replace("not in the episode", "never")


def adaptation_table(runs):
    """A row for each task and method of `ADAPTING`, with its runs that master both modes, in the order of seeds."""
    rows = []
    for (task, steps), group in report.lengths(runs).items():
        known = [run for run in group if run.method in ADAPTING and adaptation_of(run)]
        known = [run for run in known if report_agents.masters_both(adaptation_of(run)[0]["modes"])]
        for method, own in report.by_method(known).items():
            found = [report_agents.recovery_rows(task, "", adaptation_of(run)[0]) for run in own]
            row = {"task": task, "method": method, "steps": f"{steps:,}"}
            row["seeds"] = ", ".join(str(run.seed) for run in own)
            row["reward before"] = ", ".join(kinds[0]["reward before"] for kinds in found)
            for place, name in enumerate(("change", "foreign window")):
                kinds = [kinds[place] for kinds in found if len(kinds) > place]
                row[f"lowest after {name}"] = ", ".join(kind["lowest after"] for kind in kinds)
                row[f"steps to 90 % after {name}"] = ", ".join(in_table(kind["steps to 90 %"]) for kind in kinds)
            rows.append(row)
    return rows


def add_adaptation(page, runs, tasks):
    """Figures of what a change inside an episode does, of those of `tasks` that have them."""
    heading = "Adaptation inside an episode"
    page.text(heading, "")
    for task in tasks:
        found = [(run, adaptation_of(run)) for run in report.main_runs(runs, task)]
        results = [(run.method, *both) for run, both in found if both]
        if any(moved for _, _, moved in results):
            figure = report_agents.adaptation_figure(results, task)
            page.figure(heading, f"{task}_adaptation", figure, f"Reward and embedding on {task} after a change")


def of_agents(name):
    """results/`name` (wrong_z.json, actions.json): {run: its task, method, steps, and what report_agents has found}."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else {}


def seed_of(name):
    """The seed of a run, and "again" if it is not the one in results/."""
    return name.split("__")[2] + ("" if (RESULTS / "runs" / name).exists() else ", again")


def wrong_z_table(agents):
    """A row for each agent."""
    rows = []
    for name, agent in sorted(agents.items(), key=lambda pair: (pair[1]["task"], report.rank(pair[1]["method"]))):
        row = {"task": agent["task"], "method": agent["method"], "seed": seed_of(name)}
        row |= {"steps": f"{agent['steps']:,}", "return": agent["noise"]["0"]}
        row |= {f"noise {level}": agent["noise"][level] for level in ("0.5", "1", "2")}
        row |= {"empty window": agent["window"]["0"], "1 transition": agent["window"]["1"]}
        row |= {f"z of {whose}": agent["z of"].get(whose, "") for whose in ("same mode", "other mode")}
        rows.append(row)
    return rows


def add_wrong_z(page):
    heading = "How wrong may z be"
    agents = of_agents("wrong_z.json")
    page.text(heading, "")
    page.table(heading, "wrong_z", wrong_z_table(agents))
    number = {"noise": float, "window": int, "z of": str}
    for task in dict.fromkeys(agent["task"] for agent in agents.values()):
        results = []
        for agent in agents.values():
            if agent["task"] == task:
                parts = {part: {kind(key): x for key, x in agent[part].items()} for part, kind in number.items()}
                results.append((agent["method"], parts))
        results.sort(key=lambda pair: report.rank(pair[0]))
        figure = report_agents.wrong_z_figure(results, task)
        page.figure(heading, f"{task}_wrong_z", figure, f"Return on {task} when z is wrong")


def actions_table(agents):
    """A row for each agent: its mean return in the 60 contexts with each kind of actions."""
    rows = []
    for name, agent in sorted(
        agents.items(), key=lambda pair: (pair[1]["task"], report.rank(pair[1]["method"]), pair[0])
    ):
        row = {"task": agent["task"], "method": agent["method"], "seed": seed_of(name)}
        for kind, returns in agent["returns"].items():
            row[kind] = f"{np.mean(returns):.1f}"
            if agent["task"] == "ODE":
                row[f"stuck, {kind}"] = f"{100 * np.mean(np.array(returns) <= report.STUCK):.0f} %"
        rows.append(row)
    return report.even(rows)


def calm_table(agents, task, largest=0.1):
    """What z tells of a task's agents after windows whose actions have a mean size up to `largest`."""
    rows = []
    for agent in agents.values():
        for row in agent.get("calm", ()):
            size = float(row["mean size in the window"].partition(" to ")[2])
            if agent["task"] == task and size <= largest:
                own = {name: value for name, value in row.items() if name not in ("task", "run")}
                rows.append({"task": task, "method": agent["method"]} | own)
    return sorted(rows, key=lambda row: report.rank(row["method"]))


def add_actions(page):
    heading = "Calm windows"
    agents = of_agents("actions.json")
    page.text(heading, "")
    page.table(heading, "actions", actions_table(agents))
    page.table(heading, "calm_windows", calm_table(agents, "Cartpole"))


# ------------------------------------------------------- The page ----------------------------------------------------


class Found(NamedTuple):
    """What is in results/."""

    runs: list
    settings: list  # runs of these methods with a flag that is not the published runs'
    relatives: list
    held_out: list
    failed: list
    problems: list  # what cannot be used


def read_results():
    every, _, problems = report.read_runs([RESULTS / "runs", RESULTS / "settings"])
    runs = [run for run in every if run.directory.parent.name == "runs"]
    settings = [run for run in every if run.directory.parent.name != "runs"]
    problems = [line for line in problems if ": shown as " not in line]  # which those of settings/ should be
    relatives = []
    for task in aib_envs.TASKS:  # one by one, for their flags depend on it
        paths = sorted((RESULTS / "relatives").glob(f"{task}__*"))
        found, _, more = report.read_runs(paths)
        relatives += found
        problems += more
    held_out, _, more = report.read_runs([RESULTS / "held_out"])
    _, failed, rest = report.read_runs([RESULTS / "failed"])
    return Found(runs, settings, relatives, held_out, failed, [*problems, *more, *rest])


def make_agents_page(runs, figures):
    """The page about single trained agents, without the paragraphs."""
    page = report.Page(figures, "figures", kinds=("png",))
    add_adaptation(page, runs, [task for task in report.tasks_of(runs) if task not in SHOWN])
    page.table("Adaptation inside an episode", "adaptation", adaptation_table(runs))
    add_wrong_z(page)
    add_actions(page)
    return page


def make_relatives_page(relatives, held_out, figures):
    """The page of the relatives, without the paragraphs."""
    page = report.Page(figures, "figures", kinds=("png",))
    for script, heading in report.RELATIVES.items():
        own = [run for run in relatives if run.script == script]
        page.text(heading, "")
        for task in report.tasks_of(own):
            mine = [run for run in own if run.task == task]
            page.text(heading, f"**{task}**\n")
            page.table(heading, f"{task}_{heading}", report.without(report.task_table(mine, task), LESS))
            name = f"{task}_{heading.lower()}"
            page.figure(heading, name, report.context_figure(mine, task), f"Return in each context of {task}")
        if heading == "HyperZero" and held_out:
            page.text(heading, "**Contexts whose experts stage 2 has not seen** (DI, `--held-out 0.15`)\n")
            page.table(heading, "held_out", report.without(report.task_table(held_out, "DI")[:-1], LESS))
    report.add_explanations(page)
    return page


def claims_table(runs):
    """A row for each claim and set, a column for each task: P and p. Empty where too few seeds could not decide."""
    rows = {}
    for task in report.tasks_of(runs):
        for found in report.task_claims(report.main_runs(runs, task), task):
            if found["verdict"] != "too few seeds":
                row = rows.setdefault((found["claim"], found["set"]), {"claim": found["claim"], "set": found["set"]})
                row[task] = f"{found['P']}, p {found['p']}"
    order = [str(claim) for claim in report.CLAIMS]
    return report.even(sorted(rows.values(), key=lambda row: order.index(row["claim"])))


def hours_from_speed(task):
    """Of a full run of DMA*-SH on a task without one, computed from its speed; "" if that has not been measured."""
    path = RESULTS / f"speed_{task}.json"
    if not path.exists():
        return ""
    speed = json.loads(path.read_text())["training"][OURS.replace("*", "star")]["with_evaluations"]
    return f"~{aib_envs.get_task(task).total_timesteps / speed / 3600:.1f}"


def benchmark_table(runs):
    """README's: a row for each task, with our AER over all sets, the paper's of DMA*-SH, and the hours of a run."""
    rows = []
    for name in report.BENCHMARK:
        task = aib_envs.get_task(name)
        row = {"task": name, "what differs between episodes": ", ".join(d.key for d in task.dimensions)}
        row["needs the context"] = "" if task.overlap else "yes"
        main = report.main_runs(runs, name)
        own = []
        for method in ("DR", "Concat", "DMA*", OURS):
            own = [run for run in main if run.method == method]
            row[method] = f"{stats.iqm(report.aers(own, 'all sets')):.0f}" if own else ""
        row["steps"] = f"{main[0].steps:,}" if main else ""
        row["paper"] = report.PAPER["AER_aggregated_over_sets_v2"].get(name, {}).get(OURS, "")
        row["its steps"] = f"{task.total_timesteps:,}"
        row["hours"] = f"{np.mean([run.hours() for run in own]):.1f}" if own else hours_from_speed(name)
        rows.append(row)
    return rows


def add_settings(page, found, heading):
    """For each task with runs of other settings: those, beside the published runs of the same methods."""
    for task in report.tasks_of(found.settings):
        other = [run for run in found.settings if run.task == task]
        plain = [run for run in report.main_runs(found.runs, task) if run.method in {run.published for run in other}]
        page.text(heading, f"**{task}, with other flags**\n")
        page.table(heading, f"{task}_settings", report.without(report.task_table([*plain, *other], task)[:-1], LESS))


def make_page(found, figures):
    """RESULTS.md without the paragraphs: what is about several tasks first, then the tasks."""
    page = report.Page(figures, "results/figures", kinds=("png",))
    runs, failed = found.runs, found.failed
    page.figure("At a glance", "overview", report.overview_figure(runs), "The score of every run")
    page.table("At a glance", "overview", report.overview_table(runs))
    page.text("At a glance", report.ABOUT_OVERVIEW)
    report.add_over_tasks(page, runs)
    page.table("Verdicts in single tasks", "claims", claims_table(runs))
    page.text("What differs from the paper", "")
    add_settings(page, found, "What differs from the paper")
    add_adaptation(page, runs, SHOWN)
    for task in report.tasks_of(runs):
        report.add_task(page, runs, failed, task)
    page.table("Hours", "hours", report.cost_table(runs))
    report.add_explanations(page)
    report.add_notes(page, runs, failed, found.problems)
    return page


def with_text(page, name, values, problems):
    """The page as Markdown, with the title and the paragraphs of results/`name` under its headings."""
    text = (RESULTS / name).read_text()
    written = {heading: check(fill(part, values), problems) for heading, part in paragraphs(text).items()}
    if unknown := set(written) - {"", *page.sections}:
        raise LookupError(f"results/{name}: the page has no heading {', '.join(sorted(unknown))}")
    lines = [f"<!-- Made by tools/results_page.py. Write in results/{name}. -->\n", written[""]]
    for heading, parts in page.sections.items():
        lines += [f"## {heading}\n", written.get(heading, ""), *parts]
    return "\n".join(line for line in lines if line) + "\n"


def pages(found, figures):
    """{path: text} of the three pages. Makes their figures."""
    values = Values(found.runs, [*found.settings, *found.relatives, *found.held_out])
    made = {
        "RESULTS.md": (make_page(found, figures), "text.md"),
        "results/agents.md": (make_agents_page(found.runs, figures), "text_agents.md"),
        "results/relatives.md": (make_relatives_page(found.relatives, found.held_out, figures), "text_relatives.md"),
    }
    return {path: with_text(page, text, values, found.problems) for path, (page, text) in made.items()}


def fill_readme(readme, rows):
    """README.md with its table between the marks <!-- results --> and <!-- end -->, if it has them."""
    pattern = r"(<!-- results -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda match: match[1] + report.markdown(rows) + match[2], readme, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = report.fail
    parser.add_argument("--agents", type=Path, nargs="+", default=[], help="directories of runs with their agent.pt")
    args = parser.parse_args()
    try:
        found = read_results()
        if args.agents:
            roll_out(found.runs, args.agents)
        for path, text in pages(found, RESULTS / "figures").items():
            report.write(ROOT / path, text)
        readme = (ROOT / "README.md").read_text()
        report.write(ROOT / "README.md", fill_readme(readme, benchmark_table(found.runs)))
    except (OSError, LookupError) as error:
        report.fail(error)
    report.tell(found.problems)
    number = len(found.runs) + len(found.settings)
    print(f"{number} runs: RESULTS.md, results/agents.md, results/relatives.md, results/figures, README.md")


if __name__ == "__main__":
    main()
