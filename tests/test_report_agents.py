"""report_agents.py: information against closed forms, embeddings, wrong z, adaptation inside an episode."""

import csv
import dataclasses
import functools
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import aib_envs
import dma_sac
import dmah_sac
import dmash_sac
import dr_sac
import hyperdynamics
import report
import report_agents
import rsac

ROOT = Path(__file__).parent.parent


# ------------------------------------------------------ information --------------------------------------------------


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_kraskov_on_gaussians(correlation):
    rng = np.random.default_rng(0)
    x, y = rng.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], 3000).T
    assert report_agents.kraskov(x, y) == pytest.approx(-0.5 * math.log(1 - correlation**2), abs=0.05)
    assert report_agents.kraskov(100 * x, y) == pytest.approx(
        report_agents.kraskov(x, y), abs=1e-3
    )  # units do not matter


def test_kraskov_on_two_dimensional_gaussians():
    x = np.random.default_rng(0).normal(size=(3000, 2))
    y = x + np.random.default_rng(1).normal(size=(3000, 2))
    assert report_agents.kraskov(x, y) == pytest.approx(math.log(2), abs=0.07)


@pytest.mark.parametrize("share", [0.5, 0.45])
def test_a_clean_binary_code_tells_its_entropy(share):
    labels = np.arange(2000) < 2000 * share
    z = np.where(labels[:, None], [0.0, 1.0], [1.0, 0.0]) + 0.01 * np.random.default_rng(0).normal(size=(2000, 2))
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert report_agents.entropy(labels) == pytest.approx(entropy)
    assert report_agents.ross(z, labels) == pytest.approx(entropy, abs=0.01)
    assert report_agents.kraskov(z, labels.astype(float)) == pytest.approx(entropy, abs=0.02)


def test_a_code_that_knows_nothing_tells_nothing():
    rng = np.random.default_rng(0)
    assert report_agents.ross(rng.normal(size=(2000, 8)), rng.integers(0, 20, 2000)) == pytest.approx(0, abs=0.05)


def test_ties_are_no_information():
    bits = np.random.default_rng(0).integers(0, 2, (2, 1000))
    assert report_agents.kraskov(*bits) == pytest.approx(0, abs=0.1)
    assert report_agents.kraskov(np.full((1000, 8), 0.3), np.random.default_rng(0).normal(size=(1000, 8))) < 0.1
    assert report_agents.ross(np.full((1000, 8), 0.3), bits[0]) == pytest.approx(0, abs=0.1)


def test_ross_against_sklearn():
    from sklearn.feature_selection import mutual_info_classif

    labels = np.random.default_rng(0).integers(0, 3, 1500)
    x = labels + np.random.default_rng(1).normal(size=1500)
    theirs = mutual_info_classif(x[:, None], labels, n_neighbors=3, random_state=0)[0]
    assert report_agents.ross(x, labels) == pytest.approx(theirs, abs=0.02)


@pytest.mark.parametrize(("env_id", "mode"), [("DI", "inversion"), ("Walker", None), ("DI-Perm", "permutation")])
def test_variabilitys_parts_add_up(env_id, mode):
    z = np.random.default_rng(0).normal(size=(20, 30, 8)) * np.linspace(0.1, 2, 8)
    contexts = aib_envs.context_set(env_id, "train")
    z += 3 * np.array([context.get(mode, 0) for context in contexts])[:, None, None]
    total, *parts = report_agents.variability(z, contexts, mode)
    assert abs(total - sum(parts)) < 1e-10 and min(parts) >= 0 and report_agents.mode_of(env_id) == mode
    assert total == pytest.approx(np.cov(z.reshape(-1, 8).T, bias=True).trace() / 8)
    assert (parts[2] < 1e-12) == (mode is None) and parts[0] == pytest.approx(z.var(axis=1).mean())


def test_overlap_and_informativeness_of_a_clean_code():
    contexts = aib_envs.context_set("DI", "train")
    code = np.array([[context["inversion"] == 1, context["inversion"] == -1] for context in contexts], float)
    assert report_agents.overlap(code) == pytest.approx((11 * 10 + 9 * 8) / 380)
    z = code[:, None] + 1e-3 * np.random.default_rng(0).normal(size=(20, 50, 2))
    c, s, u = report_agents.informativeness(z, contexts, "inversion")
    assert s == pytest.approx(0.688, abs=0.01) and c == pytest.approx(s, abs=0.1) and u == pytest.approx(0, abs=0.1)
    z = np.array([list(context.values()) for context in contexts])[:, None] + 1e-4 * z  # knows the mass too
    c, s, u = report_agents.informativeness(z, contexts, "inversion")
    assert c == pytest.approx(math.log(20), abs=0.02) and u == pytest.approx(math.log(20) - 0.688, abs=0.2)


# ------------------------------------------------------- trained agents ----------------------------------------------


def test_recovery():
    rewards = np.array([1.0] * 50 + [0.0] * 10 + [0.5] * 10 + [1.0] * 30)
    level, low, steps = report_agents.recovery(rewards, smooth=1)
    assert (level, low, steps) == (1, 0, 20)
    assert report_agents.recovery(np.array([1.0] * 50 + [0.0] * 50))[2] is None
    assert report_agents.recovery(np.ones(100))[2] == 0  # nothing was lost
    lost_again = np.array([1.0] * 50 + [0.5] * 5 + [1.0] * 40 + [0.0] * 5)
    assert report_agents.recovery(lost_again, smooth=1)[1:] == (0, 5)


def test_recovery_rows_tell_adaptation_from_what_is_none():
    steps = lambda after, modes: [
        row["steps to 90 %"]
        for row in report_agents.recovery_rows("DI", "", {"switch": np.array([1.0] * 50 + after), "modes": modes})
    ]
    assert steps([0.0] * 20 + [1.0] * 30, [1.0, 0.9]) == [20]
    assert steps([0.0] * 50, [1.0, 0.9]) == ["not in the episode"] and steps([1.0] * 50, [1, 1]) == ["nothing lost"]
    assert steps([0.0] * 20 + [1.0] * 30, [1.0, 0.4]) == ["masters one mode only"]
    nothing = report_agents.recovery_rows("DI", "", {"switch": np.zeros(100), "modes": [0.0, 0.0]})
    assert nothing[0]["steps to 90 %"] == "nothing to lose"


def test_adaptation_figure_shows_agents_that_master_both_modes():
    runs = [("DMA", value, modes) for value, modes in ((1.0, [1.0, 0.9]), (0.5, [1.0, 0.1]))]
    results = [(m, {"switch": np.full(100, value), "modes": modes}, {}) for m, value, modes in runs]
    axis = report_agents.adaptation_figure([*results, ("DR", results[1][1] | {"modes": [0.0, 0.0]}, {})], "DI").axes[0]
    line, _ = axis.lines  # and the vertical one at 0
    assert line.get_label() == "DMA (1 of 2 runs)" and set(line.get_ydata()) == {1.0}


def test_a_foreign_window_holds_others_transitions_until_they_have_left_it():
    history = aib_envs.History(2, 4, 10, 1, 1)
    for t in range(-4, 6):
        obs = np.array([[t], [100 + t]], np.float32)
        history.add(obs, obs + 0.5, obs[:, 0], obs + 1, np.zeros(2, bool))
    positions = np.array([[0, 1, 2, 3]])  # transitions 2, 3, 4, 5
    view = report_agents.MixedWindow(history, np.array([1, 0]), 4)
    obs, actions, deltas, rewards = view.window(positions, with_rewards=True)
    assert np.array_equal(rewards, obs) and len(view.window(positions)) == 3
    assert obs[0, :, 0].tolist() == [102, 103, 4, 5] and obs[1, :, 0].tolist() == [2, 3, 104, 105]
    assert np.array_equal(actions, obs + 0.5) and (deltas == 1).all()
    own = history.window(positions)
    late = report_agents.MixedWindow(history, np.array([1, 0]), 2).window(positions)
    assert all(np.array_equal(a, b) for a, b in zip(late, own, strict=True))


def test_an_agent_that_plans_adapts_too():
    args = hyperdynamics.Args(env_id="DI", candidates=2, horizon=2, action_hold=1)
    agent = hyperdynamics.make_agent(args, hyperdynamics.make_envs(args, [{}]))
    make_envs = functools.partial(hyperdynamics.make_envs, args)
    trained = report_agents.Trained("", "HyperDynamics", "DI", agent, 500, make_envs)
    rewards, moved = report_agents.adaptation(trained, 1)
    assert rewards["foreign"].shape == (100,) and not moved


@pytest.mark.parametrize("observe", [None, "raw", "scaled"])
def test_inversion_inside_an_episode(observe):
    env = aib_envs.gym.make("AIB/DI-v0", context={"inversion": -1, "mass": 0.5}, observe_context=observe).unwrapped
    env.reset(seed=0)
    obs = env.reset(seed=0)[0]
    report_agents.invert(env, obs)
    assert env.context == {"mass": 0.5, "inversion": 1} and (observe is None or obs[-1] == 1)
    env.state[:] = 0
    obs = env.step(np.ones(2, np.float32))[0]
    assert obs[2] > 0
    assert obs[4:].tolist() == pytest.approx({None: [], "raw": [0.5, 1], "scaled": [2 * 0.4 / 1.9 - 1, 1]}[observe])


def test_pairs():
    assert report_agents.pairs_of("DI", 3)[:3] == [
        {"mass": 0.8, "inversion": -1},
        {"mass": 0.8, "inversion": 1},
        {"mass": 1.0, "inversion": -1},
    ]
    twenty = report_agents.pairs_of("Cheetah", 10)
    assert len(twenty) == 20 and all(twenty[i]["length"] == twenty[i ^ 1]["length"] for i in range(20))


def test_empty_panels_say_why():
    figure = report_agents.adaptation_figure([("DR", {"switch": np.zeros(100), "modes": [0.0, 0.0]}, {})], "DI")
    assert all(axis.texts for axis in figure.axes)
    report.plt.close(figure)


# ---------------------------------------------------------- wrong z --------------------------------------------------


def fresh(script, env_id):
    """An untrained agent, in evaluation."""
    torch.manual_seed(0)
    args = script.Args(env_id=env_id, cuda=False)
    make_envs = functools.partial(script.make_envs, args)
    agent = script.make_agent(args, make_envs([{}]))
    encoder = report_agents.encoder_of(agent)
    trained = report_agents.Trained(script.__name__, script.method_name(args), env_id, agent, 0, make_envs)
    trained.encoders = (encoder,) if encoder else ()
    trained.untrained = encoder
    return trained


@pytest.fixture
def short_episodes(monkeypatch):
    for name in ("DI", "Cartpole"):
        monkeypatch.setitem(aib_envs.TASKS, name, dataclasses.replace(aib_envs.TASKS[name], steps=12))


@pytest.mark.parametrize("script", [dma_sac, dmah_sac, dmash_sac, rsac])
def test_every_agent_with_an_encoder_has_embeddings_and_adapts(script, short_episodes):
    trained = fresh(script, "DI")
    rewards, moved = report_agents.adaptation(trained, 1)
    assert rewards["switch"].shape == rewards["foreign"].shape == (12,)
    assert moved["switch"].shape == moved["foreign"].shape == (12,)


TWO = [{"inversion": 1}, {"inversion": -1}]  # contexts of Cartpole, where every action changes the return


@pytest.mark.parametrize("script", [dma_sac, dmash_sac, rsac])
def test_a_z_that_is_not_wrong_changes_nothing(script, short_episodes):
    trained = fresh(script, "Cartpole")
    agent = trained.agent
    returns, _ = aib_envs.evaluate(trained.make_envs(TWO), agent.act, agent.window_size, 1)
    same, z = report_agents.inferred(trained, TWO)
    test = functools.partial(report_agents.returns_with, trained, TWO, 1)
    scale = report_agents.scale_of(z, agent.window_size, 1)
    rows = np.array([0, 1])
    assert np.array_equal(returns, same)
    assert np.array_equal(returns, test(report_agents.with_noise(scale, 0)))
    assert np.array_equal(returns, test(length=agent.window_size))
    assert np.array_equal(returns, test(report_agents.with_z_of(z, rows)))
    # What is wrong changes it, each in its own way.
    assert (returns != test(report_agents.with_noise(scale, 100))).any()
    assert (returns != test(report_agents.with_z_of(z, rows[::-1].copy()))).any()
    assert (returns != test(length=1)).any() and (test(length=1) != test(length=0)).any()
    # And afterwards the agent is what it was.
    assert np.array_equal(returns, test())


def test_noise_is_fresh_at_each_step_and_the_same_for_each_seed():
    scale = torch.tensor([1.0, 0.0, 10.0])
    change = report_agents.with_noise(scale, 2)
    first, second = change(torch.zeros(20_000, 3)), change(torch.zeros(20_000, 3))
    assert first.std(0).tolist() == pytest.approx([2, 0, 20], rel=0.03) and (first[:, 0] != second[:, 0]).all()
    again = report_agents.with_noise(scale, 2)(torch.zeros(20_000, 3))
    other = report_agents.with_noise(scale, 2, seed=1)(torch.zeros(20_000, 3))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_scale_of_z_is_that_of_the_contexts_means():
    means = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    noise = torch.tensor([-1.0, 1.0])[:, None, None]  # of two steps: gone in the mean
    episode = [*torch.full((3, 4, 2), 100.0) * torch.rand(3, 4, 2), *(means + noise)]  # after three of warm-up
    assert report_agents.scale_of(episode * 2, 3, 2).tolist() == [1, 0]


@pytest.mark.parametrize("n", [0, 1, 3, 4])
def test_a_short_window_is_one_that_is_not_yet_full(n):
    whole = aib_envs.History(2, 4, 10, 1, 1)
    young = aib_envs.History(2, 4, 10, 1, 1)
    for t in range(4):
        step = np.full((2, 1), t + 1.0), np.ones((2, 1)), np.ones(2), np.full((2, 1), t + 3.0), np.zeros(2, bool)
        whole.add(*step)
        if t >= 4 - n:
            young.add(*step)  # it has seen these n only
    places = np.arange(4)[None]
    short = report_agents.ShortWindow(whole, n).window(places, with_rewards=True)
    assert all(np.array_equal(a, b) for a, b in zip(short, young.window(places, with_rewards=True), strict=True))


@pytest.mark.parametrize("window", [24, 128])
def test_lengths_of_windows_show_the_encoder_twice_as_many_transitions(window):
    places = dmash_sac.subsample(1, window, training=False).numpy()
    lengths = report_agents.lengths_of(window)
    seen = [int((places >= window - length).sum()) for length in lengths]
    assert seen == {24: [0, 1, 2, 4], 128: [0, 1, 2, 4, 8, 16, 25]}[window] and lengths[-1] == window


@pytest.mark.parametrize("env_id", ["DI", "DI-Perm", "Walker"])
def test_partners_are_others_of_the_set_in_the_mode_asked_for(env_id):
    mode = report_agents.mode_of(env_id)
    contexts = aib_envs.eval_contexts(env_id)
    for other_mode in (False, True) if mode else (False,):
        found = report_agents.partners(env_id, other_mode)
        assert (found // 20 == np.arange(60) // 20).all() and (found != np.arange(60)).all()
        differs = [contexts[i].get(mode) != contexts[j].get(mode) for i, j in enumerate(found)]
        assert set(differs) == {other_mode}


def test_wrong_z_in_the_report(tmp_path, monkeypatch, short_episodes):
    agents = {"seeing": fresh(dma_sac, "DI"), "blind": fresh(dr_sac, "DI")}
    agents["signs"] = fresh(dma_sac, "relatives.aib_signs:DI-Signs")
    monkeypatch.setattr(report_agents, "load", lambda path: agents[path.name])
    monkeypatch.setattr(report_agents, "add_agent", lambda *_: None)
    monkeypatch.setattr(report_agents, "adaptation", lambda _: ({"switch": np.zeros(12), "modes": [0.0, 0.0]}, {}))
    report_agents.report([Path(name) for name in agents], tmp_path, rollouts=2)
    found = json.loads((tmp_path / "wrong_z.json").read_text())
    assert set(found) == {"seeing"}
    text = (tmp_path / "agents.md").read_text()
    assert "blind" in text and "signs: " in text  # named, as those that are left out
    assert (tmp_path / "figures" / "DI_wrong_z.png").exists()
    own = found["seeing"]
    assert own["noise"]["0"] == own["window"]["24"] == own["z of"]["own context"]
    assert np.array(own["z of"]["other mode"]).shape == (60, 2)
    rows = table(tmp_path / "tables" / "wrong_z.csv")
    assert [row["set"] for row in rows] == list(aib_envs.SPLITS)
    assert float(rows[2]["noise 4"]) == pytest.approx(np.mean(own["noise"]["4"][40:]), abs=0.06)


@pytest.mark.parametrize("script", [dr_sac, dmash_sac, rsac])
def test_sampled_actions_are_those_of_the_policys_distribution(script, short_episodes):
    trained = fresh(script, "Cartpole")
    agent = trained.agent
    returns, _ = aib_envs.evaluate(trained.make_envs(TWO), agent.act, agent.window_size, 1)
    for name, bias in (("certain", -1e3), ("uncertain", 1e3)):  # the least and the largest standard deviation
        agent.actor.head.bias.data[1] = bias
        agent.actor.head.weight.data[1] = 0
        with report_agents.sampling(agent):
            sampled, _ = aib_envs.evaluate(trained.make_envs(TWO), agent.act, agent.window_size, 1)
        assert np.allclose(sampled, returns, atol=0.02) == (name == "certain")
    again, _ = aib_envs.evaluate(trained.make_envs(TWO), agent.act, agent.window_size, 1)
    assert np.array_equal(returns, again)  # afterwards the agent acts as before


@pytest.mark.parametrize("script", [dr_sac, dmash_sac, rsac])
def test_kinds_of_actions(script, short_episodes):
    trained = fresh(script, "Cartpole")
    found = report_agents.kinds_of_actions(trained)
    noise = found["noisy"].actions[:, 0] - found["mean"].actions[:, 0]  # in the same first states
    assert 0.03 < noise.std() < 0.08
    if script is dr_sac:
        assert set(found) == {"mean", "noisy", "sampled"} and found["mean"].z is None
        return
    fixed = found["fixed z"].z
    assert np.array_equal(fixed, np.broadcast_to(fixed[:, :1], fixed.shape))
    assert np.allclose(fixed[:, 0], found["sampled"].z.mean(1))
    again, _ = aib_envs.evaluate(trained.make_envs(TWO), trained.agent.act, trained.agent.window_size, 1)
    fresh_one = fresh(script, "Cartpole").agent
    assert np.array_equal(again, aib_envs.evaluate(trained.make_envs(TWO), fresh_one.act, fresh_one.window_size, 1)[0])


def test_calm_windows_of_made_up_episodes():
    """z tells the mode where the actions have been large, and nothing where they have been small."""
    trained = fresh(dma_sac, "DI")
    modes = np.array([context["inversion"] for context in aib_envs.eval_contexts("DI")])
    actions = np.full((60, 99, 2), 0.3)
    actions[:30, 40:] = 0.01
    calm = np.zeros((60, 99), bool)
    calm[:30, 64:] = True  # the 24 steps before are all small
    z = np.zeros((60, 99, 8))
    z[..., 0] = np.where(calm, 0.5, 0.5 + 0.5 * modes[:, None])
    clear = np.zeros_like(z)
    clear[..., 0] = 0.5 + 0.5 * modes[:, None]
    episodes = lambda z: types.SimpleNamespace(z=z, actions=actions)
    found = report_agents.calm_windows(trained, {"mean": episodes(z), "noisy": episodes(z), "sampled": episodes(clear)})
    assert found["mean"][0.0, 0.02] == pytest.approx((30 * 35 / (60 * 75), 0.0, 1.0))
    assert found["mean"][0.2, 0.5][1:] == found["sampled"][0.0, 0.02][1:] == (1.0, 0.0)


def test_stuck_rollouts_are_counted_on_ode(monkeypatch):
    monkeypatch.setitem(aib_envs.TASKS, "ODE", dataclasses.replace(aib_envs.TASKS["ODE"], steps=5))
    ode, di = fresh(dr_sac, "ODE"), fresh(dr_sac, "DI")
    rows = report_agents.actions_rows(ode, report_agents.kinds_of_actions(ode))
    assert [row["set"] for row in rows] == list(aib_envs.SPLITS)
    assert all(
        row["stuck, mean"] == row["stuck, noisy"] == row["stuck, sampled"] == "100 %" for row in rows
    )  # 5 steps earn 5 at most
    found = {kind: types.SimpleNamespace(returns=np.zeros(60)) for kind in ("mean", "sampled")}
    assert not any("stuck, mean" in row for row in report_agents.actions_rows(di, found))


def test_an_untrained_encoder_sees_the_same_windows(short_episodes):
    trained = fresh(dma_sac, "DI")
    rows, z = report_agents.embedding_rows(trained)  # here the untrained encoder is its own
    assert z.shape[0] == 60 and z.shape[2] == 8
    assert all(row["I(Z;S)"].split(" of ")[0] == row[report_agents.UNTRAINED] for row in rows)


def test_the_untrained_encoder_is_always_the_same_and_not_the_agents():
    weights = lambda encoder: torch.cat([part.flatten() for part in encoder.parameters()])
    one, again = (report_agents.load(ROOT / "agents" / "DI__DMAstar-SH") for _ in range(2))
    assert torch.equal(weights(one.untrained), weights(again.untrained))
    assert not torch.equal(weights(one.untrained), weights(one.agent.encoder))
    assert report_agents.load(ROOT / "agents" / "DI__DR").untrained is None


@pytest.mark.parametrize("rollouts", ["0", "-1", "many"])
def test_a_wrong_number_of_rollouts(rollouts, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report_agents.py", "runs/none", "--rollouts", rollouts])
    with pytest.raises(SystemExit) as error:
        report_agents.main()
    assert error.value.code and len(capsys.readouterr().err.splitlines()) == 1


def table(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_embeddings_of_real_runs(tmp_path):
    flags = ["--env-id", "DI", "--total-timesteps", "20", "--learning-starts", "200", "--eval-rollouts", "1"]
    for script in ("dmash_sac.py", "rsac.py", "dr_sac.py"):
        command = [sys.executable, str(ROOT / script), *flags]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    report_agents.report([*(tmp_path / "runs").iterdir(), Path("nowhere")], tmp_path / "report")
    rows = table(tmp_path / "report" / "tables" / "embeddings.csv")
    assert [row["run"].split()[0] for row in rows[::3]] == ["DMA*-SH", "RSAC"]
    times = table(tmp_path / "report" / "tables" / "adaptation.csv")
    assert {row["what"] for row in times} == {"actuators change", "foreign window"}
    figures = [path.name for path in (tmp_path / "report" / "figures").glob("*.png")]
    assert {name.split("__")[1] for name in figures if "embeddings" in name} == {"DMAstar-SH", "RSAC"}
    assert {"DI_adaptation.png", "DI_information.png"} <= set(figures)
    assert "nowhere" in (tmp_path / "report" / "agents.md").read_text()  # named, and the others reported
