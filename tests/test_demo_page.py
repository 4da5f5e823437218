"""docs/demo.html in a headless Chromium: its networks are PyTorch's, its button works, and it fits a phone."""

import html
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import aib_envs
import dmash_sac
import dr_sac
from tools import demo_page

ROOT = Path(__file__).parent.parent
AGENTS = {"DMAstar-SH": ROOT / "agents" / "DI__DMAstar-SH", "DR": ROOT / "agents" / "DI__DR"}
PAGE = ROOT / "docs" / "demo.html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",  # with what the page writes to its console
    "--virtual-time-budget=3000",
]

in_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (Debian: apt install chromium)")


def browse(tmp_path, script, width=1280, height=800):
    """What the JavaScript function body `script` returns in the page, in a frame of that size; no errors on the way."""
    script = (
        "<script>window.onload = () => setTimeout(() => {"
        f"const result = (() => {{ {script} }})(); parent.postMessage(JSON.stringify(result), '*');"
        "}, 300)</script></body>"
    )
    (tmp_path / "page.html").write_text(PAGE.read_text().replace("</body>", script))
    (tmp_path / "frame.html").write_text(
        f'<iframe src="page.html" width="{width}" height="{height}"></iframe><pre id="result"></pre>'
        "<script>onmessage = (event) => (document.getElementById('result').textContent = event.data)</script>"
    )
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *OPTIONS, profile, "--dump-dom", f"file://{tmp_path}/frame.html"]
    for _ in range(3):  # on a busy machine Chromium may look before the page has answered
        process = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert "CONSOLE" not in process.stderr, process.stderr
        result = re.search(r'<pre id="result">(.+)</pre>', process.stdout)
        if result:
            break
    return json.loads(html.unescape(result[1]))


def load(method):
    """The trained agent in PyTorch."""
    script = {"DMAstar-SH": dmash_sac, "DR": dr_sac}[method]
    args = json.loads((AGENTS[method] / "config.json").read_text())["args"]
    agent = script.Agent(4, 2, SimpleNamespace(**args))
    agent.load_state_dict(torch.load(AGENTS[method] / "agent.pt", weights_only=True))
    return agent


@torch.inference_mode()
def episode(agent, context, flip_at, seed):
    """An episode by the benchmark's protocol in which the actuators are reversed at step `flip_at`: what the page needs
    to repeat it, and states, actions, and for DMA*-SH z and predictions."""
    envs = aib_envs.make_vec("DI", [context])
    history = aib_envs.History(1, agent.window_size, 100, 4, 2)
    log = {"all_actions": [], "states": [], "actions": [], "z": [], "predictions": []}
    for t in range(-agent.window_size, 100):
        if t in (-agent.window_size, 0):
            obs, _ = envs.reset(seed=seed + int(t < 0))
            log["start" if t == 0 else "before"] = envs.envs[0].unwrapped.state.tolist()
        if t == flip_at:
            envs.envs[0].unwrapped.context["inversion"] *= -1
        actions = agent.act(obs, history)
        log["all_actions"].append(actions[0].tolist())
        if t >= 0:
            log["states"].append(obs[0])
            log["actions"].append(actions[0])
        if t >= 0 and agent.window_size:
            window = history.window(dmash_sac.subsample(1, agent.window_size, False).numpy())
            z = agent.encoder.eval()(*map(torch.from_numpy, window))
            obs_actions = torch.from_numpy(np.hstack([obs, actions]))
            log["z"].append(z[0].numpy())
            log["predictions"].append(agent.dynamics(obs_actions, agent.hypernetwork(z))[0].numpy())
        next_obs, rewards, _, _, infos = envs.step(actions)
        history.add(obs, actions, rewards, next_obs, infos["diverged"])
        obs = next_obs
    return log


def make(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["demo_page.py", *map(str, args)])
    demo_page.main()


def test_the_page_is_made_of_the_agents_and_loads_nothing(tmp_path, monkeypatch):
    make(monkeypatch, *AGENTS.values(), "--out", tmp_path / "demo.html")
    text = PAGE.read_text()
    message = "python tools/demo_page.py agents/DI__DMAstar-SH agents/DI__DR"
    assert (tmp_path / "demo.html").read_text() == text, message
    assert not re.search(r"\b(src|href)=\"(?!data:)|https?://|@import|url\(|fetch\(|XMLHttp", text)
    assert len(text) < 2**20


def damage(directory, name):
    weights = torch.load(directory / "agent.pt", weights_only=True)
    del weights[name]
    torch.save(weights, directory / "agent.pt")


@pytest.mark.parametrize(
    "change",
    [
        lambda shared: shutil.rmtree(shared),
        lambda shared: (shared / "agent.pt").unlink(),
        lambda shared: (shared / "agent.pt").write_bytes(b"no weights"),
        lambda shared: (shared / "config.json").write_text("[]"),
        lambda shared: (shutil.rmtree(shared), shutil.copytree(AGENTS["DR"], shared)),
        lambda shared: damage(shared, "encoder.head.weight"),
    ],
)
def test_what_is_no_agent_is_refused_in_one_line(tmp_path, monkeypatch, capsys, change):
    shared = shutil.copytree(AGENTS["DMAstar-SH"], tmp_path / "shared")
    change(shared)
    with pytest.raises(SystemExit) as end:
        make(monkeypatch, shared, AGENTS["DR"], "--out", tmp_path / "demo.html")
    error = capsys.readouterr().err
    assert end.value.code == 2 and str(shared) in error and len(error.splitlines()) == 1
    assert not (tmp_path / "demo.html").exists()


@in_chromium
@pytest.mark.slow
def test_the_pages_networks_are_those_of_pytorch(tmp_path):
    contexts = [
        ({"mass": 1.0, "inversion": 1}, 50),
        ({"mass": 0.6, "inversion": -1}, None),
        ({"mass": 1.5, "inversion": -1}, 40),
    ]
    expected, requests = [], []
    for method, (context, flip_at) in itertools.product(AGENTS, contexts):
        log = episode(load(method), context, flip_at, seed=len(expected))
        request = context | {"method": method, "steps": 100, "flipAt": flip_at, "start": log["start"]}
        request["before"] = log.get("before", log["start"])
        requests += [request | {"actions": log["all_actions"]}, request]
        expected.append(log)
    found = browse(tmp_path, f"return {json.dumps(requests)}.map(demo.episode)")
    for log, forced, own in zip(expected, found[::2], found[1::2], strict=True):
        for name in ("states", "actions", "z", "predictions"):  # step by step, in PyTorch's episode
            if log[name]:
                np.testing.assert_allclose(forced[name], log[name], atol=1e-4, rtol=0, err_msg=name)
        # On its own it does the same on its way to the goal. To rest there and be reversed is a knife's edge, on which
        # the last digit decides where the point falls.
        for name in ("states", "actions"):
            np.testing.assert_allclose(own[name][:20], log[name][:20], atol=1e-3, rtol=0, err_msg=name)
    shared = [own["states"][-1] for request, own in zip(requests, found, strict=True) if request["method"] != "DR"]
    assert np.hypot(*np.transpose(shared)[:2]).max() < 0.1  # the goal's radius, in every world, after a reversal too


@in_chromium
@pytest.mark.slow
def test_the_button_reverses_the_actuators_and_the_slider_sets_the_mass(tmp_path):
    script = """
        const look = () => [demo.world.inversion, document.getElementById("badge").textContent, demo.world.mass];
        const states = [look()];
        document.getElementById("reverse").click();
        states.push(look());
        const mass = document.getElementById("mass");
        mass.value = 1.5;
        mass.dispatchEvent(new Event("input"));
        document.getElementById("reverse").click();
        states.push(look());
        return { states };
    """
    found = browse(tmp_path, script)
    assert found["states"] == [
        [1, "actuators normal", 0.5],
        [-1, "actuators reversed", 0.5],
        [1, "actuators normal", 1.5],
    ]


@in_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 390, 1280])
def test_the_page_fits(tmp_path, width):
    script = """
        const button = document.getElementById("reverse").getBoundingClientRect();
        return { width: document.documentElement.scrollWidth, bottom: button.bottom };
    """
    found = browse(tmp_path, script, width=width, height=800)
    assert found["width"] <= width  # nothing to scroll sideways
    assert found["bottom"] <= 800  # the button is seen at once
