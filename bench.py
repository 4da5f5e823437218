"""How fast the scripts are, side by side, in one run on this machine. Start it with: python bench.py --env-id Cheetah

Two tables. The first trains every script as users do, for a few hundred steps with everything on, and reads the times
that the run itself writes (checkpoints are not included). The second times the gradient step alone, counts its
floating-point operations, and holds both against the machine's own rate for float32 matrix products. All methods take
turns, round after round. With --variants it times instead what some decisions in the scripts are worth.
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
import tyro
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

import aib_envs
import aib_tools

SCRIPTS = {  # of each method, with its flags
    "DR": "dr_sac",
    "Concat": "dr_sac --context-aware",
    "DMA": "dma_sac --mask-prob 0 --no-normalise",
    "DMAstar": "dma_sac",
    "DMAstar-SH": "dmash_sac",
    "DA": "da_sac",
    "DMAstar-H": "dmah_sac",
}
REFERENCE = "DMAstar"  # what ratios are held against
PARTS = {"Encoder": "encoder", "Hypernetwork": "hypernetwork and adapters", "adapt": "hypernetwork and adapters"}


@dataclass
class Args:
    env_id: str = "Cheetah"  # the task
    methods: tuple[str, ...] = tuple(SCRIPTS)  # which methods; DMAstar is always among them
    steps: int = 300  # gradient steps of each training run
    rounds: int = 5  # how often the methods take turns
    threads: int = 1  # threads of PyTorch
    cuda: bool = False  # measure on the GPU
    compile: bool = False  # the gradient step alone (second table) under torch.compile
    variants: bool = False  # instead of both tables: gradient steps with and without some decisions, on the CPU
    small: bool = False  # only show that it runs: 20 steps, 1 round
    json_file: str | None = None  # where the medians go


# ------------------------------------------------- Training as users do -----------------------------------------------


def train(args, method):
    """Trains for a few steps in a process of its own. Returns seconds by part, and peak memory in MiB."""
    script, *flags = SCRIPTS[method].split()
    steps, task = str(args.steps), aib_envs.get_task(args.env_id)
    flags += ["--env-id", args.env_id, "--total-timesteps", steps, "--eval-every", steps, "--eval-rollouts", "1"]
    flags += ["--learning-starts", str(task.steps), "--cuda" if args.cuda else "--no-cuda"]
    with tempfile.TemporaryDirectory() as folder:
        here = Path(__file__).parent
        command = [sys.executable, str(here / f"{script}.py"), *flags, "--run-dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            aib_tools.fail(f"{' '.join(command)}\n{output}")
        (metrics,) = Path(folder).glob("*/metrics.jsonl")
        start, end = (json.loads(line) for line in metrics.read_text().splitlines())
    parts = {part: value - start["seconds"][part] for part, value in end["seconds"].items()}
    return parts | {"env_steps": end["env_steps"] - start["env_steps"], "memory": usage.ru_maxrss / 1024}


# -------------------------------------------------- The gradient step alone -------------------------------------------


class Learner:
    """A method's agent with a buffer that holds one random episode of every training context."""

    def __init__(self, args, method):
        script, *flags = SCRIPTS[method].split()
        self.module = importlib.import_module(script)
        flags += ["--env-id", args.env_id, "--cuda" if args.cuda else "--no-cuda"]
        self.args, task = tyro.cli(self.module.Args, args=flags), aib_envs.get_task(args.env_id)
        torch.manual_seed(0)
        envs = self.module.make_envs(self.args, aib_envs.context_set(args.env_id, "train"))
        self.agent, n = self.module.make_agent(self.args, envs), envs.num_envs
        obs_dim, act_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
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
        self.update, self.step = self.agent.update, 0
        if args.compile:
            self.update = torch.compile(self.update)
        elif args.cuda:
            self.update = aib_tools.CudaGraph(self.update)

    def updates(self, count):
        """Seconds per gradient step, drawing of batches excluded."""
        batches = [self.buffer.sample(self.args.batch_size) for _ in range(count)]
        frequency = self.module.POLICY_FREQUENCY
        wait = torch.cuda.synchronize if self.agent.log_alpha.is_cuda else lambda: None
        wait()
        start = time.perf_counter()
        with record_function("updates"):
            for batch in batches:
                self.update(*batch, self.step % frequency == 0)
                self.step += 1
        wait()
        return (time.perf_counter() - start) / count

    def operations(self):
        """Floating-point operations of matrix products (2 for a multiply-add) in an average gradient step."""
        rnn = torch.ops.aten
        mapping = {rnn.mkldnn_rnn_layer: lstm_operations, rnn.mkldnn_rnn_layer_backward: lstm_backward_operations}
        batch = self.buffer.sample(self.args.batch_size)
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            for turn in (True, False):
                self.agent.update(*batch, turn)
        return counter.get_total_flops() / 2

    def shares(self, count):
        """{part: share of a gradient step's time}, forward and backward, from PyTorch's profiler."""
        originals = {}
        for name in PARTS:
            if hasattr(self.module, name):
                owner, attribute = (self.module, name) if name == "adapt" else (getattr(self.module, name), "forward")
                originals[owner, attribute] = function = getattr(owner, attribute)
                setattr(owner, attribute, ranged(function, PARTS[name]))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            self.updates(count)
        for (owner, attribute), function in originals.items():
            setattr(owner, attribute, function)
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
    parts, part_of = dict.fromkeys(PARTS.values(), 0.0), {}
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
        omega, build = generate(self, z), "bck, irk -> brci"  # chunk c, row r of a chunk, column i
        down = torch.einsum(build, omega.down, omega.head_down.unflatten(1, (-1, 65))).flatten(1, 2)
        up = torch.einsum(build, omega.up, omega.head_up.unflatten(1, (-1, 65))).flatten(1, 2)
        return omega._replace(down=down, up=up)

    apply = lambda x, matrix, head: (matrix @ x[:, :, None]).squeeze(2)
    return {(module.Hypernetwork, "forward"): forward, (module, "generated_linear"): apply}


def encoding_per_loss(module):
    """An omega of their own, with fresh masks, for the Q-loss and each policy loss. It is made, but not used."""
    original = module.Agent.update

    def update(self, obs, actions, next_obs, rewards, window, policy_turn):
        with torch.no_grad():
            for _ in range(1 + module.POLICY_FREQUENCY * policy_turn):
                self.infer(window)
        return original(self, obs, actions, next_obs, rewards, window, policy_turn)

    return {(module.Agent, "update"): update}


def generated_per_sample(module):
    """The hypernetworks generate for each sample of the batch, not once for each training context."""

    def forward(self, x, context):
        contexts, which = context
        return self.head(module.adapt(self.trunk(x), self.hypernetwork(which @ contexts)))

    return {(module.MLP, "forward"): forward}


VARIANTS = {"DMAstar-SH": (matrices, encoding_per_loss), "DA": (generated_per_sample,)}


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
    rows, medians = [], {}
    for method, variants in VARIANTS.items():
        learner = Learner(args, method)
        for variant in variants:
            changes, ratios = variant(learner.module), []
            with varied(changes):
                other = Learner(args, method)
                other.updates(2)
            for _ in range(args.rounds):
                seconds = learner.updates(20)
                with varied(changes):
                    ratios.append(other.updates(20) / seconds)
            medians[variant.__name__] = {"method": method, "time_ratio": float(np.median(ratios))}
            rows.append([variant.__name__, method, spread(ratios, 2)])
    return table(["variant", "method", "gradient step, times as long"], rows), medians


# ------------------------------------------------------- Tables -------------------------------------------------------


def spread(values, digits=1):
    """Median and range."""
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(header, rows):
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def parts_of(args, learner):
    """Shares of the encoder, and of hypernetwork and adapters, where the profiler sees them: not in a graph."""
    return {} if args.cuda or args.compile else learner.shares(4)


def training_table(args, runs):
    """runs: {method: [what `train` returns]}."""
    header = ["method", "updates/s", "with evaluations", "policy, ms", "environments, ms", "sampling, ms", "update, ms"]
    header += ["env steps/s", "evaluation, s", "evaluation steps/s", "memory, MiB"]
    rows, medians, task = [], {}, aib_envs.get_task(args.env_id)
    window = {method: 0 if method in ("DR", "Concat", "DA") else task.window for method in runs}
    for method, results in runs.items():
        part = {name: np.array([result[name] for result in results]) for name in results[0]}
        ms = {name: 1e3 * part[name] / args.steps for name in ("act", "env", "sample", "update")}
        step = sum(ms.values()) / 1e3
        columns = {
            "updates_per_second": 1 / step,
            "with_evaluations": 1 / (step + part["eval"] / 5_000),  # one evaluation every 5,000 steps
            **{f"{name}_ms": value for name, value in ms.items()},
            "env_steps_per_second": part["env_steps"] / part["env"].clip(0.01),
            "evaluation_seconds": part["eval"],
            "evaluation_steps_per_second": 60 * (window[method] + task.steps) / part["eval"],
            "memory_mib": part["memory"],
        }
        medians[method] = {name: float(np.median(value)) for name, value in columns.items()}
        digits = [1, 1, 2, 2, 2, 1, 0, 2, 0, 0]
        rows.append([method, *(spread(value, d) for value, d in zip(columns.values(), digits, strict=True))])
    return table(header, rows), medians


def update_table(learners, seconds, operations, shares, rate):
    """The gradient step alone; `seconds`: {method: [...]}, `rate`: matrix products' operations per second."""
    header = ["method", "ms", *dict.fromkeys(PARTS.values()), "rest", "Gflop", "Gflop/s", "of the matrix rate"]
    header += ["time / DMAstar", "work / DMAstar", "replay buffer, MiB"]
    rows, medians = [], {}
    for method in learners:
        ms = 1e3 * np.array(seconds[method])
        median, gflop = float(np.median(ms)), operations[method] / 1e9
        parts = {part: float(np.median([s[part] for s in shares[method]])) * median for part in shares[method][0]}
        ratio = float(np.median(np.array(seconds[method]) / np.array(seconds[REFERENCE])))
        medians[method] = {
            "ms": median,
            "parts_ms": parts,
            "gflop": gflop,
            "share_of_matrix_rate": operations[method] / (median / 1e3) / rate,
            "time_ratio": ratio,
            "work_ratio": operations[method] / operations[REFERENCE],
        }
        row = [f"{parts[part]:.1f}" if parts else "" for part in dict.fromkeys(PARTS.values())]
        row += [f"{median - sum(parts.values()):.1f}"]
        row += [f"{gflop:.2f}", f"{gflop / median * 1e3:.0f}", f"{100 * medians[method]['share_of_matrix_rate']:.0f} %"]
        row += [f"{ratio:.2f}", f"{medians[method]['work_ratio']:.2f}", f"{learners[method].buffer_mib:.0f}"]
        rows.append([method, spread(ms), *row])
    return table(header, rows), medians


def main():
    args = aib_tools.read_flags(Args, __doc__, Args())
    for method in args.methods:
        if method not in SCRIPTS:
            aib_tools.fail(f"unknown method {method}; allowed: {', '.join(SCRIPTS)}")
    if args.env_id not in aib_envs.TASKS:
        aib_tools.fail(f"unknown task {args.env_id}; allowed: {', '.join(aib_envs.TASKS)}")
    if min(args.steps, args.rounds, args.threads) < 1:
        aib_tools.fail("--steps, --rounds and --threads must be at least 1")
    if args.json_file and not Path(args.json_file).absolute().parent.is_dir():
        aib_tools.fail(f"--json-file {args.json_file}: there is no such directory")
    if args.cuda and not torch.cuda.is_available():
        aib_tools.fail("there is no GPU here for --cuda")
    if args.variants and (args.cuda or args.compile):
        aib_tools.fail("--variants goes neither with --cuda nor with --compile")
    if args.small:
        args.steps, args.rounds = 20, 1
    methods = [method for method in SCRIPTS if method in (*args.methods, REFERENCE)]
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the scripts
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)

    if args.variants:
        text, variants = variants_table(args)
        print(text)
        if args.json_file:
            aib_tools.write(Path(args.json_file), {"args": vars(args), "variants": variants})
        return

    runs, seconds, shares, rates = {}, {}, {}, []
    for i in range(args.rounds):
        for method in methods:
            print(
                f"round {i + 1} of {args.rounds}: training with {method}", end="\x1b[K\r", file=sys.stderr, flush=True
            )
            runs.setdefault(method, []).append(train(args, method))
    print(end="\x1b[K", file=sys.stderr)
    learners = {method: Learner(args, method) for method in methods}
    for learner in learners.values():
        learner.updates(8)  # compiles, or records CUDA graphs
    for _ in range(args.rounds):
        rates.append(matrix_rate(learners[REFERENCE].agent.log_alpha.device))
        for method, learner in learners.items():
            seconds.setdefault(method, []).append(learner.updates(20))
            shares.setdefault(method, []).append(parts_of(args, learner))

    place = "GPU" if args.cuda else f"{args.threads} thread{'s' * (args.threads > 1)}"
    print(f"{args.env_id}, {place}, {args.steps} gradient steps, median and range of {args.rounds} rounds\n")
    text, training = training_table(args, runs)
    print(text)
    if args.cuda:
        print("\nThe host does not wait for the GPU: of policy, sampling and update only the sum means something.")
    on_cpu = dataclasses.replace(args, cuda=False, compile=False)  # operations are counted there
    operations = {m: (Learner(on_cpu, m) if args.cuda else learner).operations() for m, learner in learners.items()}
    text, updates = update_table(learners, seconds, operations, shares, np.median(rates))
    rate = f"float32 matrix products: {spread(np.array(rates) / 1e9, 0)} Gflop/s"
    print(f"\nThe gradient step alone{' under torch.compile' * args.compile}. {rate}\n\n{text}")
    if args.json_file:
        results = {"args": vars(args), "matrix_gflops": float(np.median(rates)) / 1e9}
        results |= {"training": training, "update": updates}
        aib_tools.write(Path(args.json_file), results)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        aib_tools.fail(error)
    except KeyboardInterrupt:
        aib_tools.fail("stopped", 130)
