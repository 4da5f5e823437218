"""The trained agents in agents/ do what their results.json says."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import aib_envs
import aib_run
import watch

DIRECTORY = Path(__file__).parent.parent / "agents"
AGENTS = sorted(DIRECTORY.iterdir())
LONG = [agent for agent in AGENTS if not agent.name.startswith("DI__")]


def returns_of(directory):
    """Of one rollout in each of the 60 contexts: returns now, and those in results.json [60]."""
    agent, args, make_envs = aib_run.load_agent(directory)
    envs = make_envs(args, aib_envs.eval_contexts(args.env_id))
    returns, _ = aib_envs.evaluate(envs, agent.act, agent.window_size, rollouts=1)
    results = json.loads((directory / "results.json").read_text())["returns"]
    return returns[:, 0], np.concatenate([np.array(results[split])[:, 0] for split in aib_envs.SPLITS])


@pytest.mark.parametrize(
    "agent", [pytest.param(x, marks=[pytest.mark.slow] if x in LONG else []) for x in AGENTS], ids=lambda x: x.name
)
def test_an_agent_earns_what_its_results_say(agent):
    returns, published = returns_of(agent)
    bounds = aib_envs.get_task(json.loads((agent / "results.json").read_text())["args"]["env_id"]).bounds
    # Single episodes may part ways on another processor; their mean must not, by more than a hundredth of the scale.
    assert abs(returns.mean() - published.mean()) < 0.01 * bounds[1]


@pytest.mark.parametrize("agent", AGENTS, ids=lambda x: x.name)
def test_an_agent_is_small_and_names_no_machine(agent):
    assert (agent / "agent.pt").stat().st_size < 2 * 2**20
    for name in ("config.json", "results.json"):
        assert json.loads((agent / name).read_text())["args"]["run_dir"] == "runs"


def test_an_agent_of_a_method_that_its_script_does_not_make_is_refused(tmp_path, capsys):
    directory = Path(shutil.copytree(DIRECTORY / "DI__DR", tmp_path / "agent"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"method": "Mine"}))
    with pytest.raises(SystemExit):
        aib_run.load_agent(directory)
    assert "Mine" in capsys.readouterr().err


def test_two_agents_side_by_side(tmp_path, capsys):
    agents = tuple(str(DIRECTORY / name) for name in ("DI__DR", "DI__DMAstar-SH"))
    watch.main(watch.Args(agents, context=("inversion=-1",), flip_at=50, out=str(tmp_path / "video.gif")))
    watch.main(watch.Args(agents[:1], out=str(tmp_path / "alone.gif")))
    with Image.open(tmp_path / "video.gif") as both, Image.open(tmp_path / "alone.gif") as one:
        assert both.n_frames == one.n_frames == 100
        assert both.width == 2 * one.width and both.height == one.height


WRONG = [{"agents": ()}, {"flip_at": 100}, {"context": ("mass=-1",)}, {"out": "no/where.gif"}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_cannot_be_watched(wrong, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    options = {"agents": (str(DIRECTORY / "DI__DR"),)} | wrong
    with pytest.raises(SystemExit) as end:
        watch.main(watch.Args(**options))
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
