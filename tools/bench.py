"""How fast the methods are, side by side, on this machine.

    python tools/bench.py --env-id Cheetah               every method of the paper
    python tools/bench.py --methods DR DMAstar-H         some of those in tools/methods.py; DMAstar is always among them
    python tools/bench.py --variants                     what some decisions in the scripts are worth

Two tables. The first trains every method as users do, for a few hundred steps with everything on. The second times the
gradient step alone, counts its floating-point operations, and holds both against the machine's own rate for float32
matrix products. All methods take turns, round after round: compare the ratios of one call.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import aib_envs
import aib_run
from tools.methods import METHODS

SCRIPTS = {name: method for name, method in METHODS.items() if "/" not in method.script}  # relatives learn otherwise
REFERENCE = "DMAstar"  # what ratios are held against
BLOCK = 20  # gradient steps that are timed at once
PARTS = {"Encoder": "encoder", "Hypernetwork": "hypernetwork and adapters", "adapt": "hypernetwork and adapters"}


@dataclass
class Args:
    env_id: str = "Cheetah"  # the task, or module:Task of your own file
    methods: tuple[str, ...] = tuple(name for name, method in SCRIPTS.items() if not method.extra)  # which methods
    steps: int = 300  # gradient steps of each training run
    rounds: int = 5  # how often the methods take turns
    threads: int = 1  # threads of PyTorch
    cuda: bool = False  # measure on the GPU
    compile: bool = False  # the gradient step alone (second table) under torch.compile
    variants: bool = False  # instead of both tables: gradient steps with and without some decisions, on the CPU
    json_file: str | None = None  # where the medians go


# ------------------------------------------------- Training as users do -----------------------------------------------


def train(args, method):
    """Trains for a few steps in a process of its own. Returns the seconds of training and of an evaluation, the steps
    of environments, and peak memory in MiB."""
    steps = args.steps
    random_steps = aib_envs.get_task(args.env_id).steps
    flags = f"{SCRIPTS[method].flags} --env-id {args.env_id} --total-timesteps {steps} --eval-every {steps}"
    flags += f" --eval-rollouts 1 --learning-starts {random_steps} {'--cuda' if args.cuda else '--no-cuda'}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / SCRIPTS[method].script), *flags.split(), "--run-dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        with process.stdout:
            output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)  # which also tells the memory
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            aib_run.fail(f"{' '.join(command)}\n{output}")
        (metrics,) = Path(folder).glob("*/metrics.jsonl")
        start, end = (json.loads(line) for line in metrics.read_text().splitlines())
    return {
        "train": end["seconds"]["train"] - start["seconds"]["train"],
        "eval": end["seconds"]["eval"] - start["seconds"]["eval"],
        "env_steps": end["env_steps"] - start["env_steps"],
        "memory": usage.ru_maxrss / 1024,
    }


# -------------------------------------------------- The gradient step alone -------------------------------------------


class Learner:
    """A method's agent with a buffer that holds one random episode of every training context."""

    def __init__(self, args, method):
        self.module = importlib.import_module(Path(SCRIPTS[method].script).stem)
        flags = f"{SCRIPTS[method].flags} --env-id {args.env_id} {'--cuda' if args.cuda else '--no-cuda'}"
        self.args = aib_run.parse_args(self.module.Args, flags.split())
        task = aib_envs.get_task(args.env_id)
        torch.manual_seed(0)
        envs = self.module.make_envs(self.args, aib_envs.context_set(args.env_id, "train"))
        n = envs.num_envs
        self.agent = self.module.make_agent(self.args, envs)
        obs_dim = envs.single_observation_space.shape[0]
        act_dim = envs.single_action_space.shape[0]
        history = aib_envs.History(n, self.agent.window_size, task.steps, obs_dim, act_dim)
        for t in range(-self.agent.window_size, task.steps):
            if t in (-self.agent.window_size, 0):
                obs, _ = envs.reset(seed=aib_envs.reset_seeds(n, 0, 0, 0, int(t < 0)))
            actions = 2 * torch.rand(n, act_dim).numpy() - 1
            next_obs, rewards, _, _, infos = envs.step(actions)
            history.add(obs, actions, rewards, next_obs, infos["diverged"])
            obs = next_obs
        self.buffer = self.module.ReplayBuffer(history, self.args.buffer_size, self.agent.log_alpha.device)
        self.buffer.add(history)
        self.buffer_mib = sum(x.nbytes for x in vars(self.buffer).values() if torch.is_tensor(x)) / 2**20
        self.update = self.agent.update
        self.step = 0
        if args.compile:
            self.update = torch.compile(self.update)
        elif args.cuda:
            self.update = aib_run.CudaGraph(self.update)

    def samples(self, count):
        """Batches, and the seconds that it takes to draw one."""
        self.wait()
        start = time.perf_counter()
        batches = [self.buffer.sample(self.args.batch_size) for _ in range(count)]
        self.wait()
        return batches, (time.perf_counter() - start) / count

    def wait(self):
        if self.agent.log_alpha.is_cuda:
            torch.cuda.synchronize()

    def updates(self, count):
        """Seconds per gradient step, drawing of batches excluded."""
        batches, _ = self.samples(count)
        frequency = self.module.POLICY_FREQUENCY
        start = time.perf_counter()
        with record_function("updates"):
            for batch in batches:
                self.update(*batch, self.step % frequency == 0)
                self.step += 1
        self.wait()
        return (time.perf_counter() - start) / count

    def operations(self):
        """Floating-point operations of matrix products (2 for a multiply-add) in an average gradient step."""
        aten = torch.ops.aten
        mapping = {aten.mkldnn_rnn_layer: lstm_operations, aten.mkldnn_rnn_layer_backward: lstm_backward_operations}
        batch = self.buffer.sample(self.args.batch_size)
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            for turn in (True, False):
                self.agent.update(*batch, turn)
        return counter.get_total_flops() / 2

    def shares(self, count):
        """{part: share of a gradient step's time}, forward and backward, from PyTorch's profiler."""
        changes = {}
        for name in PARTS:
            if name == "adapt" and hasattr(self.module, name):
                changes[self.module, name] = ranged(self.module.adapt, PARTS[name])
            elif hasattr(self.module, name):
                owner = getattr(self.module, name)
                changes[owner, "forward"] = ranged(owner.forward, PARTS[name])
        with varied(changes), profile(activities=[ProfilerActivity.CPU]) as profiler:
            self.updates(count)
        return shares_of(profiler.events())


def lstm_operations(x_shape, w_ih_shape, w_hh_shape, *_, **__):
    """Of one LSTM layer: x [time, batch, inputs], weights [4 hidden, inputs] and [4 hidden, hidden]."""
    return 2 * x_shape[0] * x_shape[1] * (w_ih_shape[0] * w_ih_shape[1] + w_hh_shape[0] * w_hh_shape[1])


def lstm_backward_operations(*shapes, **__):
    return 2 * lstm_operations(*shapes)  # gradients of the inputs, and of the weights


def ranged(function, part):
    """`function`, named in the profiler."""

    def wrapped(*args):
        with record_function(part):
            return function(*args)

    return wrapped


def shares_of(events):
    """A backward operation belongs to the part that its forward operation (of the same sequence number) lies in."""
    parts = dict.fromkeys(PARTS.values(), 0.0)
    part_of = {}
    for event in events:
        parent = event
        while parent and parent.name not in parts:
            parent = parent.cpu_parent
        if parent and event.sequence_nr >= 0 and not event.name.startswith("autograd::"):
            part_of[event.sequence_nr] = parent.name
    for event in events:
        if event.name in parts and not (event.cpu_parent and event.cpu_parent.name in parts):
            parts[event.name] += event.time_range.elapsed_us()
        elif event.name.startswith("autograd::engine::evaluate_function") and event.sequence_nr in part_of:
            parts[part_of[event.sequence_nr]] += event.time_range.elapsed_us()
    total = sum(event.time_range.elapsed_us() for event in events if event.name == "updates")
    return {part: value / total for part, value in parts.items()}


def matrix_rate(device):
    """Float32 matrix products: operations per second."""
    size, repeats = (8192, 20) if device.type == "cuda" else (1024, 4)
    a = torch.randn(size, size, device=device)
    a @ a
    wait = torch.cuda.synchronize if a.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        a @ a
    wait()
    return repeats * 2 * size**3 / (time.perf_counter() - start)


# ---------------------------------------------- What decisions are worth ----------------------------------------------


def matrices(module):
    """The adapter's matrices are built, once for each omega, and all networks multiply by them."""
    generate = module.Hypernetwork.forward

    def forward(self, z):
        omega = generate(self, z)
        build = "bck, irk -> brci"  # chunk c, row r of a chunk, column i
        down = torch.einsum(build, omega.down, omega.head_down.unflatten(1, (-1, 65))).flatten(1, 2)
        up = torch.einsum(build, omega.up, omega.head_up.unflatten(1, (-1, 65))).flatten(1, 2)
        return omega._replace(down=down, up=up)

    def generated_linear(x, matrix, head):
        return (matrix @ x[:, :, None]).squeeze(2)

    return {(module.Hypernetwork, "forward"): forward, (module, "generated_linear"): generated_linear}


def encoding_per_loss(module):
    """An omega of their own, with fresh masks, for the Q-loss and each policy loss. It is made, but not used."""
    original = module.Agent.update

    def update(self, obs, actions, next_obs, rewards, last, window, update_policy):
        with torch.no_grad():
            for _ in range(1 + module.POLICY_FREQUENCY * update_policy):
                self.infer(window)
        return original(self, obs, actions, next_obs, rewards, last, window, update_policy)

    return {(module.Agent, "update"): update}


def generated_per_sample(module):
    """The hypernetworks generate for each sample of the batch, not once for each training context."""

    def forward(self, x, context):
        contexts, which = context
        return self.head(module.adapt(self.trunk(x), self.hypernetwork(which @ contexts)))

    return {(module.MLP, "forward"): forward}


VARIANTS = {
    "matrices": "DMAstar-SH",
    "encoding_per_loss": "DMAstar-SH",
    "generated_per_sample": "DA",
}  # of which method


@contextlib.contextmanager
def varied(changes):
    """With {(owner, name): attribute} in place of the owners' own."""
    originals = {(owner, name): getattr(owner, name) for owner, name in changes}
    for (owner, name), attribute in changes.items():
        setattr(owner, name, attribute)
    try:
        yield
    finally:
        for (owner, name), attribute in originals.items():
            setattr(owner, name, attribute)


def variants_table(args):
    """The gradient step with and without each decision, in turns."""
    rows = []
    medians = {}
    for name, method in VARIANTS.items():
        learner = Learner(args, method)
        changes = globals()[name](learner.module)
        with varied(changes):
            other = Learner(args, method)
            other.updates(2)
        ratios = []
        for _ in range(args.rounds):
            seconds = learner.updates(BLOCK)
            with varied(changes):
                ratios.append(other.updates(BLOCK) / seconds)
        medians[name] = {"method": method, "time_ratio": float(np.median(ratios))}
        rows.append([name, method, spread(ratios, 2)])
    return table(["variant", "method", "gradient step, times as long"], rows), medians


# ------------------------------------------------------- Tables -------------------------------------------------------


def spread(values, digits=1):
    """Median and range."""
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(header, rows):
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def training_table(args, runs):
    """runs: {method: [what `train` returns]}."""
    header = ["method", "updates/s", "with evaluations", "ms", "env steps/s", "evaluation, s", "memory, MiB"]
    rows = []
    medians = {}
    for method, results in runs.items():
        part = {name: np.array([result[name] for result in results]) for name in results[0]}
        seconds = part["train"] / args.steps  # an update: a gradient step and a step in all environments
        columns = {
            "updates_per_second": (1 / seconds, 1),
            "with_evaluations": (1 / (seconds + part["eval"] / 5_000), 1),  # one evaluation every 5,000 steps
            "ms": (1e3 * seconds, 1),
            "env_steps_per_second": (part["env_steps"] / part["train"], 0),
            "evaluation_seconds": (part["eval"], 2),
            "memory_mib": (part["memory"], 0),
        }
        medians[method] = {name: float(np.median(values)) for name, (values, _) in columns.items()}
        rows.append([method, *(spread(values, digits) for values, digits in columns.values())])
    return table(header, rows), medians


def update_table(learners, rounds, operations, rate):
    """The gradient step alone. rounds: {method: [{"update": s, "sample": s, "shares": {part: share}}]}, operations:
    {method: number}, rate: matrix products' operations per second."""
    parts = list(dict.fromkeys(PARTS.values()))
    header = ["method", "ms", *parts, "rest", "Gflop", "Gflop/s", "of the matrix rate"]
    header += ["time / DMAstar", "work / DMAstar", "sampling, ms", "replay buffer, MiB"]
    rows = []
    medians = {}
    seconds = {method: np.array([found["update"] for found in rounds[method]]) for method in learners}
    for method, learner in learners.items():
        ms = 1e3 * float(np.median(seconds[method]))
        gflop = operations[method] / 1e9
        of_part = {}
        for part in parts:
            shares = [found["shares"][part] for found in rounds[method] if found["shares"]]
            if shares:
                of_part[part] = ms * float(np.median(shares))
        share = gflop / ms * 1e12 / rate
        time_ratio = float(np.median(seconds[method] / seconds[REFERENCE]))
        work_ratio = operations[method] / operations[REFERENCE]
        sample_ms = 1e3 * float(np.median([found["sample"] for found in rounds[method]]))
        medians[method] = {
            "ms": ms,
            "parts_ms": of_part,
            "gflop": gflop,
            "share_of_matrix_rate": share,
            "time_ratio": time_ratio,
            "work_ratio": work_ratio,
            "sample_ms": sample_ms,
            "buffer_mib": learner.buffer_mib,
        }
        row = [method, spread(1e3 * seconds[method])]
        row += [f"{of_part[part]:.1f}" if of_part else "" for part in parts]
        row += [f"{ms - sum(of_part.values()):.1f}", f"{gflop:.2f}", f"{gflop / ms * 1e3:.0f}", f"{100 * share:.0f} %"]
        row += [f"{time_ratio:.2f}", f"{work_ratio:.2f}", f"{sample_ms:.2f}", f"{learner.buffer_mib:.0f}"]
        rows.append(row)
    return table(header, rows), medians


def check(args):
    """Ends the program with one line if something cannot be measured."""
    for method in args.methods:
        if method not in SCRIPTS:
            aib_run.fail(f"--methods: unknown method {method}; allowed: {', '.join(SCRIPTS)}")
    try:
        aib_envs.get_task(args.env_id)
    except ValueError as error:
        aib_run.fail(f"--env-id: {error}")
    if min(args.steps, args.rounds, args.threads) < 1:
        aib_run.fail("--steps, --rounds and --threads must be at least 1")
    if args.json_file and not Path(args.json_file).absolute().parent.is_dir():
        aib_run.fail(f"--json-file {args.json_file}: there is no such directory")
    if args.cuda and not torch.cuda.is_available():
        aib_run.fail("--cuda: there is no GPU here")
    if args.variants and (args.cuda or args.compile):
        aib_run.fail("--variants goes neither with --cuda nor with --compile")


def measure(args):
    """Prints both tables. Returns the medians."""
    methods = [method for method in SCRIPTS if method in (*args.methods, REFERENCE)]
    runs = {method: [] for method in methods}
    for i in range(args.rounds):
        for method in methods:
            text = f"round {i + 1} of {args.rounds}: training with {method}"
            print(text, end="\x1b[K\r", file=sys.stderr, flush=True)
            runs[method].append(train(args, method))
    print(end="\x1b[K", file=sys.stderr)

    learners = {method: Learner(args, method) for method in methods}
    for learner in learners.values():
        learner.updates(8)  # compiles, or records CUDA graphs
    rates = []
    rounds = {method: [] for method in methods}
    for _ in range(args.rounds):
        rates.append(matrix_rate(learners[REFERENCE].agent.log_alpha.device))
        for method, learner in learners.items():
            found = {"update": learner.updates(BLOCK), "sample": learner.samples(BLOCK)[1], "shares": {}}
            if not (args.cuda or args.compile):  # the profiler does not see into a graph
                found["shares"] = learner.shares(4)
            rounds[method].append(found)
    on_cpu = dataclasses.replace(args, cuda=False, compile=False)  # operations are counted there
    operations = {m: (Learner(on_cpu, m) if args.cuda else learner).operations() for m, learner in learners.items()}

    place = "GPU" if args.cuda else f"{args.threads} thread{'s' * (args.threads > 1)}"
    print(f"{args.env_id}, {place}, {args.steps} gradient steps, median and range of {args.rounds} rounds\n")
    text, training = training_table(args, runs)
    print(text)
    rate = f"float32 matrix products: {spread(np.array(rates) / 1e9, 0)} Gflop/s"
    print(f"\nThe gradient step alone{' under torch.compile' * args.compile}. {rate}\n")
    text, update = update_table(learners, rounds, operations, float(np.median(rates)))
    print(text)
    return {"matrix_gflops": float(np.median(rates)) / 1e9, "training": training, "update": update}


def main():
    args = aib_run.read_flags(Args, sys.argv[1:], description=__doc__)
    check(args)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the scripts
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    if args.variants:
        text, medians = variants_table(args)
        print(text)
        results = {"variants": medians}
    else:
        results = measure(args)
    if args.json_file:
        aib_run.write(Path(args.json_file), {"args": vars(args)} | results)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        aib_run.fail(error)
    except KeyboardInterrupt:
        aib_run.fail("stopped", 130)
