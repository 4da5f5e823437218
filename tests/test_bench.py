"""tools/bench.py: that it runs, that its counts are right; and the CUDA graph that it can measure."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import types

import learning
import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import aib_envs
import aib_run
from tools import bench


def run(*flags, cwd=None):
    command = [sys.executable, str(learning.ROOT / "tools/bench.py"), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def options(**changed):
    return bench.Args(**{"env_id": "DI"} | changed)


def check_tables(text, results):
    methods = ["DR", "DMAstar", "DMAstar-SH"]  # the reference is always there
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [[row.split("|")[1].strip() for row in table[2:]] for table in tables] == [methods, methods]
    assert all(row.count("|") == table[0].count("|") for table in tables for row in table)
    assert list(results["training"]) == list(results["update"]) == methods and results["matrix_gflops"] > 1
    update = results["update"]
    parts = dict.fromkeys(bench.PARTS.values())
    encoder, adapters = ({m: update[m]["parts_ms"][part] for m in methods} for part in parts)
    assert encoder["DR"] == adapters["DR"] == adapters["DMAstar"] == 0 < min(encoder["DMAstar"], adapters["DMAstar-SH"])
    assert encoder["DMAstar-SH"] + adapters["DMAstar-SH"] < update["DMAstar-SH"]["ms"]
    assert update["DMAstar"]["time_ratio"] == update["DMAstar"]["work_ratio"] == 1 < update["DMAstar-SH"]["work_ratio"]


@pytest.fixture
def quick(monkeypatch):
    """Times of two gradient steps and of episodes of five steps mean nothing."""
    monkeypatch.setattr(bench, "BLOCK", 2)
    monkeypatch.setitem(aib_envs.TASKS, "DI", dataclasses.replace(aib_envs.TASKS["DI"], steps=5))


def test_both_tables(quick, monkeypatch, capsys, tmp_path):
    trained = {"train": 1.0, "eval": 1.0, "env_steps": 100, "memory": 500.0}
    monkeypatch.setattr(bench, "train", lambda args, method: trained)
    path = tmp_path / "speed.json"
    flags = "--env-id DI --methods DR DMAstar-SH --rounds 2 --json-file"
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split(), str(path)])
    bench.main()
    check_tables(capsys.readouterr().out, json.loads(path.read_text()))


def test_training_is_timed():
    found = bench.train(options(steps=10), "DR")
    assert 0.01 < found["train"] < 600 and 0.01 < found["eval"] < 600
    assert found["env_steps"] == 20 * (10 - 1) and found["memory"] > 100  # the first is made before step 0 is logged


@pytest.mark.slow
def test_it_runs_from_any_directory(tmp_path):
    flags = ("--env-id", "DI", "--methods", "DR", "DMAstar-SH", "--steps", 5, "--rounds", 1)
    done = run(*flags, "--json-file", "speed.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check_tables(done.stdout, json.loads((tmp_path / "speed.json").read_text()))


def test_rates_of_training():
    """Two rounds of 100 steps, of which the second took twice as long in everything but the evaluation."""
    first = {"train": 1.0, "eval": 6.0, "env_steps": 3000, "memory": 500.0}
    second = {"train": 2.0, "eval": 6.0, "env_steps": 3000, "memory": 700.0}
    args = types.SimpleNamespace(env_id="Cheetah", steps=100)
    _, medians = bench.training_table(args, {"DR": [first, second], "DMAstar": [second, second]})
    assert medians["DR"]["updates_per_second"] == pytest.approx((100 + 50) / 2)  # 100 steps in 1 s, in 2 s
    assert medians["DMAstar"]["updates_per_second"] == pytest.approx(50)
    assert medians["DMAstar"]["ms"] == pytest.approx(20)
    # 5,000 steps take 100 s, and the evaluation after them 6 s
    assert medians["DMAstar"]["with_evaluations"] == pytest.approx(5000 / 106)
    assert medians["DR"]["env_steps_per_second"] == pytest.approx((3000 + 1500) / 2)
    assert medians["DR"]["memory_mib"] == 600


@pytest.mark.parametrize("name", {method.script: method.name for method in learning.MAIN_METHODS}.values())
def test_every_script_can_be_measured(name, quick):
    learner = bench.Learner(options(), name)
    assert learner.updates(2) > 0 and learner.samples(1)[1] > 0 and learner.buffer_mib > 0


def test_a_task_of_another_module_can_be_measured():
    args = options(env_id="relatives.aib_signs:DI-Signs")
    bench.check(args)
    assert bench.Learner(args, "DR").updates(1) > 0


def losses_of(learner, changes=None):
    """Of two gradient steps on fixed batches, from the weights that a new learner has."""
    with bench.varied(changes or {}):
        torch.manual_seed(1)
        batches = [learner.buffer.sample(64) for _ in range(2)]
        return [{k: v.item() for k, v in learner.agent.update(*batch, True).items()} for batch in batches]


@pytest.mark.parametrize(("method", "variant"), [("DMAstar-SH", bench.matrices), ("DA", bench.generated_per_sample)])
def test_a_variant_is_the_same_function(method, variant):
    args = options()
    one = bench.Learner(args, method)
    other = bench.Learner(args, method)
    calls = []
    logged = lambda function: lambda *inputs: calls.append(1) or function(*inputs)
    changes = {where: logged(function) for where, function in variant(one.module).items()}
    expected = losses_of(one)
    assert not calls
    for step, losses in zip(expected, losses_of(other, changes), strict=True):
        assert losses == pytest.approx(step, rel=1e-4)
    assert calls
    calls.clear()
    losses_of(other)  # the original is back
    assert not calls


def test_encodings_for_each_loss(monkeypatch):
    learner = bench.Learner(options(), "DMAstar-SH")
    calls = []
    learner.agent.encoder.register_forward_hook(lambda *_: calls.append(1))
    batch = learner.buffer.sample(64)
    with bench.varied(bench.encoding_per_loss(learner.module)):
        learner.agent.update(*batch, False)
        assert len(calls) == 2  # dynamics and Q-functions
        learner.agent.update(*batch, True)
        assert len(calls) == 2 + 4  # and two steps of the policy
    learner.agent.update(*batch, True)
    assert len(calls) == 2 + 4 + 1


def test_variants_are_timed(quick):
    text, medians = bench.variants_table(options(rounds=1))
    rows = [[cell.strip() for cell in row.split("|")[1:3]] for row in text.splitlines()[2:]]
    assert rows == [[name, variant["method"]] for name, variant in medians.items()]
    assert dict(rows) == bench.VARIANTS and all(variant["time_ratio"] > 0 for variant in medians.values())


@pytest.mark.parametrize(
    "flags",
    [
        ("--methods", "DMA*"),
        ("--methods", "HyperZero"),
        ("--env-id", "Chetah"),
        ("--env-id", "nowhere:DI"),
        ("--rounds", "0"),
        ("--variants", "--compile"),
        ("--json-file", "/nowhere/speed.json"),
        ("--cuda",),
    ],
)
def test_bad_flags_get_one_line_that_names_them(flags, monkeypatch, capsys):
    if "--cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and flags[0] in message and len(message.splitlines()) == 1


def products(inputs, outputs):
    """Multiply-adds of an unadapted network for one sample: forward, and for the gradients of a backward pass."""
    first, rest = inputs * 256, 256 * 256 + 256 * outputs
    return {"forward": first + rest, "inputs": rest, "all inputs": first + rest, "weights": first + rest}


def test_operations_of_dr_are_the_counted_ones():
    actor, q = products(4, 4), products(6, 1)
    critics = q["forward"] * 2 + (q["forward"] + q["inputs"] + q["weights"]) * 2 + actor["forward"]
    policy = actor["forward"] + actor["inputs"] + actor["weights"] + 2 * (q["forward"] + q["all inputs"])
    learner = bench.Learner(options(), "DR")
    assert learner.operations() == 2 * 256 * (critics + policy)  # two policy updates every second step


def test_operations_of_an_lstm():
    assert bench.lstm_operations((25, 256, 32), (128, 32), (128, 32)) == 25 * 256 * 4 * 32 * (32 + 32) * 2


def test_what_the_encoder_costs_is_counted_once_forward_and_twice_backward():
    """DMA's dynamics model sees 8 numbers more than DR's networks: the LSTM and its embedding are the rest."""
    learner = bench.Learner(options(), "DMAstar")
    batch = learner.buffer.sample(256)
    with bench.FlopCounterMode(display=False) as without:
        learner.agent.update(*batch, False)
    lstm = 4 * 256 * 4 * 32 * (32 + 32) * 2  # 4 of the window's 24 transitions
    counts = [learner.operations() for _ in range(2)]
    assert counts[0] == counts[1] > without.get_total_flops()
    with bench.FlopCounterMode(display=False) as turn:
        learner.agent.update(*batch, True)
    assert counts[0] == (without.get_total_flops() + turn.get_total_flops()) / 2 + 3 * lstm


def test_backward_time_belongs_to_the_part_of_the_forward_operation():
    big, small = torch.randn(1024, 1024, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    encoder, adapters = dict.fromkeys(bench.PARTS.values())
    matches = []
    for backward in (False, True) * 5:  # times are measured: on a busy machine not every one tells
        with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("updates"):
            with record_function(adapters):
                loss = (big @ big).sum()
            with record_function(encoder):
                loss = loss + (small @ small).sum()
            if backward:
                loss.backward()
            else:
                torch.randn(1024, 1024) @ torch.randn(1024, 2048)  # as much work, in no part
        shares = bench.shares_of(profiler.events())
        fits = shares[adapters] > 0.8 and shares[encoder] < 0.2 if backward else shares[adapters] < 0.6
        matches += [backward] if fits else []
    assert set(matches) == {False, True}


# ------------------------------------------------------- CUDA graph --------------------------------------------------


@pytest.fixture
def fake_cuda(monkeypatch):
    """CUDA graphs on a CPU: `log` tells what is done; recording runs nothing; a replay is the recorded call again."""
    log, recording = [], []

    class Graph:
        def replay(self):
            log.append("replay")
            self.run()

    class Stream:
        def wait_stream(self, other):
            log.append("wait")

    @contextlib.contextmanager
    def record(graph, stream):
        recording.append(graph)
        yield
        recording.clear()

    for name, value in {"CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream, "graph": record}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return log, recording


def test_cuda_graph_does_what_the_function_does(fake_cuda):
    log, recording = fake_cuda
    state = {True: torch.zeros(2), False: torch.zeros(2)}

    def function(x, pair, flag):
        out = torch.empty(2)

        def work():
            state[flag].add_(x * pair[0] - pair[1])
            out.copy_(state[flag])

        if recording:
            recording[0].run = work
        else:
            log.append("call")
            work()
        return {"out": out}

    graph, expected = aib_run.CudaGraph(function), {True: torch.zeros(2), False: torch.zeros(2)}
    for i in range(12):
        flag = i % 3 == 0
        x, a, b = torch.randn(3, 2).unbind()
        expected[flag] += x * a - b
        torch.testing.assert_close(graph(x, (a, b), flag)["out"], expected[flag])
        x.zero_()  # an argument's memory is the caller's
    done = [entry for entry in log if entry != "wait"]
    assert done.count("call") == 3 + 3 and done.count("replay") == 12 - 6 and len(graph.graphs) == 2
    assert log.count("wait") == 2 * done.count("call")  # before and after what runs on the graph's stream


@pytest.mark.parametrize("method", learning.MAIN_METHODS, ids=lambda method: method.name)
def test_a_gradient_step_stays_on_its_device_and_waits_for_nothing(method, monkeypatch):
    """The device "meta" has no values: a tensor from the CPU, or Python that asks for a value, raises there."""
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, **_: adam(parameters, lr, foreach=False))
    module = learning.script(method.script)
    args = learning.parse(module, method.flags)
    envs = module.make_envs(args, aib_envs.context_set("DI", "train")[:2])
    sizes = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    with torch.device("meta"):
        agent = module.Agent(*sizes, args)
    buffer = module.ReplayBuffer(aib_envs.History(2, agent.window_size, 100, *sizes), 1000, torch.device("meta"))
    buffer.ends = torch.zeros(20, dtype=torch.int64, device="meta")
    buffer.begins = torch.zeros(20, dtype=torch.int64, device="meta")
    buffer.total = 100
    for update_policy in (True, False):
        losses = agent.update(*buffer.sample(32), update_policy)
        assert ("actor_loss" in losses) == update_policy and {x.device.type for x in losses.values()} == {"meta"}
