"""README.md's figures are those of results/, its commands and code those of the repository."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats

import aib_envs
import readme
import report
import report_agents

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "README.md").read_text()


def test_every_table_is_made_from_results_and_every_figure_is_there():
    runs, agents, relatives, held_out, problems = readme.read_results()
    drawn = {name: text for name, (text, _) in readme.figures(runs, agents, relatives).items()}
    plt.close("all")
    assert readme.fill(PAGE, readme.parts(runs, agents, relatives, held_out, drawn)) == PAGE and not problems
    shown = re.findall(r"!\[.+\]\(results/figures/(.+?)\.png\)", PAGE)
    assert set(shown) == set(drawn) == {path.stem for path in (ROOT / "results" / "figures").iterdir()}


def test_results_say_what_made_them_and_are_small():
    runs, agents, relatives, *_ = readme.read_results()
    assert len({run.steps for run in runs}) == 1
    commits = {run.method: config_of(run)["commit"] for run in runs}
    assert {(run.method, config_of(run)["commit"]) for run in runs} == set(commits.items())  # one for each method
    assert all(re.fullmatch(r"[0-9a-f]{40}", commit) and commit[:7] in PAGE for commit in commits.values())
    assert {agent["run"] for found in agents.values() for agent in found["adaptation"]} == {
        run.directory.name for run in runs if report_agents.mode_of(run.task)
    }
    assert all(re.fullmatch(r"[0-9a-f]{40}", config_of(run)["commit"]) for run in relatives)
    files = [path for path in (ROOT / "results").rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 2**20 and sum(path.stat().st_size for path in files) < 2**22


def config_of(run):
    return json.loads((run.directory / "config.json").read_text())


def test_the_equations_code_is_in_the_script():
    code = re.findall(r"^\| .+ \| `(.+)` \|$", PAGE, re.MULTILINE)
    lines = [line.partition("  # ")[0].strip() for line in (ROOT / "dmash_sac.py").read_text().splitlines()]
    assert len(code) == 8 and set(code) <= set(lines)


def test_the_benchmark_is_its_thirteen_tasks_and_no_other():
    grid = re.search(r"ENVS=\$\{ENVS:-(.+?)\}", (ROOT / "runs.sh").read_text())[1]
    assert [row["task"] for row in readme.benchmark_table()] == grid.split() and len(grid.split()) == 13


@pytest.mark.parametrize(
    ("task", "message"),
    [(None, "no finished runs, nothing is written"), ("Walker", "has no runs of tasks with reversed")],
)
def test_agents_of_nothing_leave_the_old_results(task, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "read_runs", lambda _: ([made(task, "DR", 1, 10)] if task else [], ["x: no runs here"]))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    (tmp_path / "agents.json").write_text("old")
    with pytest.raises(SystemExit) as stop:
        readme.main(readme.Args(agents="rnus"))
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert (tmp_path / "agents.json").read_text() == "old"


def test_agents_are_rolled_out_once(tmp_path, monkeypatch):
    runs, done = runs_of("Cartpole", DR=[600, 700]), []

    def adaptation(trained):
        done.append(trained.run)
        return {"modes": np.array(trained.modes), "usual": np.full(3, len(done))}, {}

    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "read_some_runs", lambda _: (runs, []))
    monkeypatch.setattr(readme, "load_agent", lambda run: SimpleNamespace(run=run.name, modes=modes[run.name]))
    monkeypatch.setattr(report_agents, "adaptation", adaptation)
    first, second = (run.directory.name for run in runs)
    modes = {first: [0.12345, 0.5], second: [0.1, 0.2]}
    (tmp_path / "agents.json").write_text("damaged")
    for name in (first, second):
        (tmp_path / "runs" / name).mkdir(parents=True)
    found = readme.roll_out(tmp_path)
    assert done == [first, second] and found["Cartpole"]["adaptation"][0]["rewards"]["modes"] == [0.123, 0.5]
    (tmp_path / "agents.json").write_text(json.dumps(found))
    assert readme.roll_out(tmp_path) == found and len(done) == 2
    modes[second] = [0.1, 0.3]  # it has been trained for longer
    rows = readme.roll_out(tmp_path)["Cartpole"]["adaptation"]
    assert done[2:] == [second] and [row["rewards"]["usual"][0] for row in rows] == [1, 3]
    del runs[0]  # its agent is on another machine
    assert [row["run"] for row in readme.roll_out(tmp_path)["Cartpole"]["adaptation"]] == [first, second]
    (tmp_path / "runs" / first).rmdir()  # nor is it among the results any more
    assert [row["run"] for row in readme.roll_out(tmp_path)["Cartpole"]["adaptation"]] == [second]


def test_paths_of_an_agent_that_is_elsewhere_stay(tmp_path, monkeypatch, capsys):
    runs = runs_of("DI", DR=[10, 20, 30], **{readme.OURS: [70, 80]})
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "read_runs", lambda _: (runs, []))
    monkeypatch.setattr(report, "read_some_runs", lambda _: (runs[:3], []))
    monkeypatch.setattr(readme, "load_agent", lambda run: SimpleNamespace(method="DR", name=run.name, modes=[0, 1]))
    monkeypatch.setattr(report_agents, "adaptation", lambda trained: ({"modes": np.array(trained.modes)}, {}))
    monkeypatch.setattr(report_agents, "paths", lambda shown, _: {x.method: np.array([shown.index(x)]) for x in shown})
    (tmp_path / "agents.json").write_text(
        json.dumps({"DI": {"adaptation": [], "paths": {"DR": [7], readme.OURS: [8]}}})
    )
    assert readme.roll_out(tmp_path)["DI"]["paths"] == {"DR": [0], readme.OURS: [8]}
    assert capsys.readouterr().err.startswith(f"{runs[3].directory.name}: not in")


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
        ([3, 4, 1.5], [0, 1, 2], "undecided"),
        ([100, 101], [0, 1], "too few seeds"),
        ([100, 101], [0, 1, 2, 3], "too few seeds"),  # p = 1 / 15
        ([100, 101], [0, 1, 2, 3, 4], "holds"),  # p = 1 / 21
    ],
)
def test_verdicts(x, y, said):
    assert readme.verdict([(x, y)]) == said


def test_verdicts_over_several_tasks():
    """One task with two seeds cannot say anything; two of them can (1 way in 36), if both say the same."""
    clear = [100, 101], [0, 1]
    assert readme.verdict([clear, clear]) == "holds" and readme.p_value([clear, clear]) == 1 / 36
    assert readme.verdict([clear, clear[::-1]]) == "undecided"
    assert readme.verdict([clear[::-1], clear[::-1]]) == "does not hold"


@pytest.mark.parametrize("ties", [False, True])
def test_p_values(ties):
    """For one task scipy's exact test; for several, a simulation."""
    draw = np.random.default_rng(1)
    one = lambda *sizes: [(draw.integers(0, 4, n) if ties else draw.random(n)).astype(float) for n in sizes]
    x, y = one(4, 3)
    statistic = lambda x, y: report.improvement(x, y)
    expected = scipy.stats.permutation_test((x, y), statistic, alternative="greater", n_resamples=np.inf).pvalue
    assert readme.p_value([(x, y)]) == pytest.approx(expected)
    if not ties:
        assert expected == pytest.approx(scipy.stats.mannwhitneyu(x, y, alternative="greater", method="exact").pvalue)
    groups = [(x, y), one(2, 3), one(2, 2)]

    def dealt():
        for x, y in groups:
            both = draw.permutation([*x, *y])
            yield both[: len(x)], both[len(x) :]

    mean = lambda groups: sum(report.improvement(x, y) for x, y in groups)
    share = np.mean([mean(dealt()) >= mean(groups) - 1e-9 for _ in range(20_000)])
    assert readme.p_value(groups) == pytest.approx(share, abs=0.012)  # three standard errors


def made(task, method, seed, aer):
    """A run whose return is `aer` in every context of training and eval-in, and 10 less in eval-out."""
    returns = {split: np.full((20, 1), aer - 10.0 * (split == "eval-out")) for split in aib_envs.SPLITS}
    metrics = [{"seconds": {"update": 1800.0, "env": 360.0 * seed}}]
    return report.Run(Path(f"{task}__{method}__{seed}"), task, method, seed, 1000, {}, None, returns, metrics)


def runs_of(task, **values):
    return [made(task, m.replace("_", "*-"), i, x) for m, own in values.items() for i, x in enumerate(own, 1)]


def test_return_over_environment_steps_counts_all_of_them():
    """The mean over seeds, at the steps that all seeds have, and of several values at one number of steps the last."""
    runs = [made("DI", "DMA*-SH", seed, 0) for seed in (1, 2)]
    for seed, run in enumerate(runs, 1):
        points = [(1000, 1), (1000, 2 * seed), (3000, 10 * seed), (5000 + seed, 99)]
        run.metrics[:] = [{"env_steps": x, "aer": dict.fromkeys(aib_envs.SPLITS, y)} for x, y in points]
    for axis in readme.steps_figure([*runs, made("ODE", "DMA*-SH", 1, 50)], "DI").axes:
        (line,) = axis.lines
        assert list(line.get_xdata()) == [1000, 3000] and list(line.get_ydata()) == [3, 15]


def test_results_end_with_doing_nothing():
    first, nothing = readme.results_table(runs_of("Cartpole", DR=[600]))
    assert (first["method"], first["all sets"]) == ("DR", "596.7")
    envs = aib_envs.make_vec("Cartpole", aib_envs.context_set("Cartpole", "train"))
    still = np.zeros(envs.action_space.shape, np.float32)
    returns = aib_envs.evaluate(envs, lambda obs, history: still, 0, 1)
    assert nothing["method"] == "doing nothing" and float(nothing["train"]) == pytest.approx(returns.mean(), rel=0.03)


def test_doing_nothing_has_as_many_rollouts_as_a_run(tmp_path, monkeypatch):
    kept = json.loads((ROOT / "results" / "zero_action.json").read_text())["ODE"]
    monkeypatch.setattr(report, "HERE", tmp_path)
    for split, returns in report.zero_returns("ODE", tmp_path).items():
        np.testing.assert_allclose(returns, kept[split], atol=0.02)
    envs = aib_envs.make_vec("ODE", aib_envs.eval_contexts("ODE"))
    returns = aib_envs.evaluate(envs, lambda obs, history: np.zeros((60, 2), np.float32), 0, 10)
    np.testing.assert_allclose(np.concatenate(list(kept.values())), returns.mean(1), atol=0.02)


def test_claims():
    runs = runs_of("DI", DR=[10, 20, 30], DMA_SH=[60, 70, 80]) + runs_of(
        "BallInCup", DR=[65, 80, 90], DMA_SH=[75, 80, 85]
    )
    first, second = readme.tasks_table(runs)
    assert first == {
        "claim": "DR fails: below 0.6 of DMA*-SH",
        "task": "DI",
        "seeds": "3 and 3",
        "all sets": "66.7 and 16.7: holds",
        "eval-out": "60.0 and 10.0: holds",
    }
    assert second["claim"].startswith("DR does not fail") and second["task"] == "BallInCup"
    assert second["all sets"] == "75.0 and 76.7: undecided"  # 61.7 is below 0.8 times 81.7
    (row,) = readme.tasks_table(runs_of("DI", DR=[40, 50, 55], DMA_SH=[60, 70, 80]))
    assert "undecided" in row["all sets"]  # though 51.7 is below 56.7
    (row,) = readme.tasks_table(runs_of("BallInCup", DR=[10, 20, 30], DMA_SH=[60, 70, 80]))
    assert row["all sets"].endswith("does not hold")


def test_claims_over_tasks():
    """Every task counts the same, those of one kind only, and those that lack one of the two methods do not."""
    runs = runs_of("DI", DMA_SH=[60, 70, 80], DA=[65, 10, 10]) + runs_of("ODE", DMA_SH=[50, 90], DA=[70, 80])
    runs += runs_of("DI-Perm", DA=[1, 2, 3]) + runs_of("DI-Friction", DMA_SH=[1, 2, 3], DA=[4, 5, 6])
    first, second = readme.claims_table(runs)
    assert (first["claim"], first["kind"], first["tasks"]) == ("DMA*-SH above DA", "non-overlapping", "DI, ODE")
    assert first["seeds"] == "3 and 3, 2 and 2"
    # 8 of 9 pairs and 2 of 4. Ways with i of 9 pairs: 1 1 2 3 3 3 3 2 1 1, with j of 4: 1 1 2 1 1. As high: 24 of 120
    assert first["all sets"] == "0.69, p = 0.200: undecided"
    assert (second["kind"], second["tasks"]) == ("overlapping", "DI-Friction")
    assert second["all sets"] == "0.00, p = 1.000: does not hold"
    (row,) = readme.claims_table(runs_of("DI", DR=[40, 50, 55], DMA_SH=[60, 70, 80]))
    assert row["all sets"].startswith("0.22")  # 56.7, 66.7, 76.7 against 61.1, 77.8, 86.1
    assert row["train"].startswith("0.22") and row["eval-in"] == row["train"]  # 60, 70, 80 against 66.7, 83.3, 91.7
    assert row["eval-out"].startswith("0.39")  # 50, 60, 70 against 50, 66.7, 75
    far = runs_of("DI", DA=range(7), DMA_SH=range(50, 57))
    assert readme.claims_table(far)[0]["all sets"] == "1.00, p < 0.001: holds"  # 1 way of 3432


def test_beside_the_paper():
    """Every task has the same weight, whatever number of seeds it has."""
    runs = runs_of("DI", DR=[10, 20], DMA_SH=[60, 75, 90]) + runs_of("DI-Perm", DMA_SH=[50, 30])
    (row,) = readme.paper_table(runs)  # DR has no DI-Perm
    interval = row["all sets"].partition(" ")[2]
    assert row == {
        "kind": "non-overlapping",
        "tasks": "DI, DI-Perm",
        "method": "DMA*-SH",
        "seeds": "3, 2",
        # of 60 60 75 75 90 90 and 30 30 30 50 50 50 the middle half: 50 50 50 60 60 75
        "all sets": f"{57.5 / 100 - 1 / 30:.2f} {interval}",
        "paper, all sets": "0.80",
        "all sets, plain mean": f"{57.5 / 100 - 1 / 30:.2f}",  # of 75 and 40
        "eval-out": f"0.48 {row['eval-out'].partition(' ')[2]}",
        "paper, eval-out": "0.73",
        "eval-out, plain mean": "0.48",
    }
    low, high = map(float, interval.strip("[]").split(","))
    assert 0.26 < low < 0.47 < 0.6 < high < 0.87
    (row,) = readme.paper_table(runs_of("DI", DMA_SH=[60, 70, 80]))
    assert row["eval-out"] == "0.60 [0.50, 0.70]"  # one resample in 27 is the lowest seed three times
    (row,) = readme.paper_table(runs_of("DI", DMA_SH=[60, 80]))
    assert row["eval-out"] == "0.60"
    (row,) = readme.paper_table(runs_of("DI", DMA_SH=[60, 70, 80]) + runs_of("DI-Perm", DMA_SH=[60]))
    assert " " not in row["eval-out"]  # one seed alone has no spread


def test_the_run_shown_is_the_median():
    assert [readme.median_run(runs_of("DI", DR=x)).seed for x in ([5, 1, 9], [5, 1, 9, 7], [4])] == [1, 1, 1]
    assert readme.median_run(runs_of("DI", DR=[1, 9, 5])).seed == 3


def test_cost():
    one, total = readme.cost_table(runs_of("DI", DR=[10, 20]), [])
    assert one == {"task": "DI", "runs": 2, "hours": "1.3", "DR, a run": "0.60 to 0.70"} and total["hours"] == "1.3"
    last = readme.cost_table(runs_of("DI", DR=[10, 20]), runs_of("Cartpole", HyperZero=[10]))[-1]
    assert last == {"task": "relatives (below)", "runs": 1, "hours": "0.6", "DR, a run": ""}


def test_one_mode():
    run = made("DI", "DMA*", 3, 80.0)
    assert readme.one_mode([run]).endswith(": none.\n")
    reversed_ = [context["inversion"] == -1 for context in aib_envs.context_set("DI", "train")]
    run.returns["train"][reversed_] = 10.0
    assert readme.one_mode([run]).endswith(": DI, DMA*, seed 3 (80.0 and 10.0).\n")


def test_adaptation_is_in_the_order_of_the_seeds():
    agent = lambda seed, lost: {
        "method": "DMA*",
        "seed": seed,
        "rewards": {"switch": [1.0] * 50 + [0.0] * lost + [1.0] * (50 - lost), "modes": [1.0, 1.0]},
    }
    (row,) = readme.adaptation_table({"DI": {"adaptation": [agent(2, 30), agent(1, 20)]}})
    assert row["seeds"] == "1, 2" and row["steps to 90 % after inversion"] == "20, 30"
    assert row["lowest after foreign window"] == ""


def test_numbers_of_the_speed_section():
    prose = " ".join(PAGE.split("## Speed\n")[1].split("\n## ")[0].split())
    one, two = (json.loads((ROOT / "results" / name).read_text()) for name in ("speed.json", "speed_2_threads.json"))
    speed = {method: loop["updates_per_second"] for method, loop in one["training"].items()}
    said = re.findall(r"(\d+) % more time than DMA", prose)
    assert said == [f"{100 * (speed['DMA'] / speed['DMAstar-SH'] - 1):.0f}"]
    assert f"{100 * (speed['DA'] / speed['DMAstar-SH'] - 1):.0f} % more than DA" in prose
    assert f"at {100 * one['update']['DMAstar-SH']['share_of_matrix_rate']:.0f} % of the" in prose
    assert f"{two['training']['DMAstar-SH']['updates_per_second']:.0f} updates/s" in prose
    memory = {method: loop["memory_mib"] for method, loop in one["training"].items()}
    more = [memory["DMAstar-SH"] / memory[method] - 1 for method in ("DMA", "DA")]
    assert f"{100 * more[0]:.0f} % above DMA's and {100 * more[1]:.0f} % above DA's" in prose


def test_numbers_of_what_decisions_are_worth():
    variants = json.loads((ROOT / "results" / "speed_variants.json").read_text())["variants"]
    prose = " ".join(PAGE.split())
    ratio = {name: f"{variant['time_ratio']:.1f} times as long" for name, variant in variants.items()}
    assert f"once for each sample, a gradient step takes {ratio['generated_per_sample']}" in prose
    assert f"that would make a gradient step {ratio['encoding_per_loss']}" in prose
    assert f"Built once per gradient step, they make it {ratio['matrices']}" in prose


def test_held_out():
    runs = [made("DI", "HyperZero", seed, 10 * seed) for seed in (1, 2)] + [made("DI", "MLP", 1, 5)]
    for run in runs:
        run.metrics[-1]["experts"], run.held_out = list(range(20)), [1, 3]
    rows = readme.held_out_table(runs)
    assert [(row["method"], row["seeds"], row["held out"], row["its experts, held out"]) for row in rows] == [
        ("HyperZero", 2, "10.0, 20.0", "2.0, 2.0"),
        ("MLP", 1, "5.0", "2.0"),
    ]


def test_relatives():
    zero, dynamics = made("DI", "HyperZero", 1, 50.0), made("DI", "HyperDynamics", 1, 70.0)
    zero.script, dynamics.script = "hyperzero.py", "hyperdynamics.py"
    zero.metrics[0]["experts"] = [60.0] * 20
    error = dict.fromkeys(aib_envs.SPLITS, 0.125)
    dynamics.metrics[0]["prediction"] = {"one_step": error, "twenty_step": error}
    (row,) = readme.relatives_table([zero, dynamics], "hyperzero")
    assert row == {
        "task": "DI",
        "method": "HyperZero",
        "seeds": 1,
        "steps": 1000,
        "train": "50.0",
        "eval-in": "50.0",
        "eval-out": "40.0",
        "its experts, train": "60.0",
    }
    (row,) = readme.relatives_table([zero, dynamics], "hyperdynamics")
    assert row["method"] == "HyperDynamics" and row["twenty step, eval-out"] == "0.12" and "its experts" not in row
