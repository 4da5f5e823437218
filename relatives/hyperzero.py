"""HyperZero: zero-shot transfer by supervised learning on solved tasks (arXiv 2211.15457), in one file.

Stage 1 trains an expert by TD3 in each training context and records rollouts of the final policies. In stage 2 a
hypernetwork learns to turn a context, which it is told, into the expert's whole policy and Q-function; for new contexts
it generates them without another step of learning. With --model mlp, networks that get the context as input learn from
the same data (UVFA). Start it with: python hyperzero.py --env-id DI, or --env-id Cheetah-Speed (aib_speed.py)
"""

import copy
import functools
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import aib_envs
import aib_speed  # noqa: F401 (it adds tasks whose reward depends on the context)
import aib_tools

# ----------------------------------------------------- Arguments ------------------------------------------------------


@dataclass
class Args:
    env_id: str = "DI"  # the task: DI, DI-Friction, DI-Perm, ODE, ODE-1 ... ODE-20, Cartpole, Cheetah, ... (see README)
    seed: int = 1  # seed of the run
    total_timesteps: int | None = None  # stage 1: vector steps (one of every expert); default: the task's own
    cuda: bool = True  # use a GPU if there is one
    run_dir: str = "runs"  # where the run's own directory is made
    eval_every: int = 5_000  # stage 1: steps between evaluations of the experts with 1 rollout
    eval_epochs: int = 50  # stage 2: epochs between evaluations with 1 rollout per context
    eval_rollouts: int = 10  # rollouts per context of the last evaluation
    resume: str | None = None  # directory of a run to go on with
    keep_checkpoint: bool = False  # keep the checkpoint of a finished run (which cannot be extended)
    eval_only: str | None = None  # directory of a finished run, whose last evaluation is repeated
    context: tuple[str, ...] = ()  # with --eval-only: the one context to roll out in, as in length=1.3 inversion=-1
    capture_video: bool = False  # at the end, record an episode as video.gif: in --context, or in both modes
    track: bool = False  # send metrics and video to Weights & Biases
    learning_starts: int = 5_000  # stage 1: vector steps with random actions that come before the first gradient step
    buffer_size: int = 100_000  # stage 1: transitions per expert in the replay buffer
    batch_size: int = 256  # stage 1: transitions of each expert per gradient step
    gamma: float = 0.99  # discount factor
    tau: float = 0.01  # stage 1: smoothing coefficient of the target networks
    expert_lr: float = 1e-4  # stage 1: learning rate of policies and Q-functions
    noise_steps: int = 100_000  # stage 1: steps in which the noise (explorers' and targets') falls from 1.0 to 0.1
    rollouts: int = 10  # stage 1: rollouts of every final expert in the data set
    dataset: str = ""  # directory of a run whose data set is taken, with its stage 1's flags; only stage 2 is done then
    held_out: float = 0.0  # stage 2: fraction of the training contexts that it does not see, at most all but one
    model: Literal["hyper", "mlp"] = "hyper"  # stage 2: generate networks from the context, or give it them as input
    q: bool = True  # stage 2: learn the Q-function, too?
    td: bool = True  # stage 2: the TD term for the Q-function's target, too?
    epochs: int = 500  # stage 2: in each, as many tuples are drawn as the data set has
    hyper_batch_size: int = 512  # stage 2: tuples per gradient step, rounded up to as many of every context
    hyper_lr: float = 1e-4  # stage 2: learning rate


STAGE_1 = "total_timesteps", "learning_starts", "buffer_size", "batch_size", "gamma", "tau", "expert_lr", "noise_steps"
WIDTH = 256  # size of the networks' layers
UPDATE_EVERY, POLICY_DELAY = 2, 2  # experts learn every second vector step, their policies every second time
LOSS_WEIGHTS = {"action": 1.0, "value": 0.01, "td": 0.01}  # Eqs. 4, 5


def method_name(args):
    if args.td and not args.q:
        aib_tools.fail("--no-q needs --no-td, for that term is about Q")
    names = {"hyper": ("HyperZero-noQ", "HyperZero-noTD", "HyperZero"), "mlp": ("MLP", "UVFA-noTD", "UVFA")}
    return names[args.model][args.q + args.td]


# -------------------------------------- Stage 1: stacked experts and their data set -----------------------------------
# n agents learn at once: a layer holds the weights of all of them, and one batched product applies them. They share
# nothing: losses are summed over agents, so that each gradient is the agent's own, and Adam works element by element.


class StackedLinear(nn.Module):
    """n linear layers: [n, batch, inputs] -> [n, batch, outputs]."""

    def __init__(self, n, inputs, outputs):
        super().__init__()
        bound = inputs**-0.5  # nn.Linear's
        self.weight = nn.Parameter(torch.empty(n, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n, 1, outputs).uniform_(-bound, bound))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


def mlp(linear, inputs, outputs):
    return nn.Sequential(linear(inputs, WIDTH), nn.ReLU(), linear(WIDTH, WIDTH), nn.ReLU(), linear(WIDTH, outputs))


class Experts(nn.Module):
    """n agents that learn by TD3 (Fujimoto et al. 2018), each in its own context."""

    def __init__(self, n, obs_dim, act_dim, args):
        super().__init__()
        self.args, linear = args, functools.partial(StackedLinear, n)
        self.actor = mlp(linear, obs_dim, act_dim)
        self.qf1, self.qf2 = mlp(linear, obs_dim + act_dim, 1), mlp(linear, obs_dim + act_dim, 1)
        self.targets = copy.deepcopy(nn.ModuleList([self.actor, self.qf1, self.qf2]))
        adam = functools.partial(torch.optim.Adam, lr=args.expert_lr, fused=True)
        self.q_optimizer = adam([*self.qf1.parameters(), *self.qf2.parameters()])
        self.actor_optimizer = adam(self.actor.parameters())

    @torch.inference_mode()
    def act(self, obs, history=None, std=0.0):
        """obs [n, obs_dim] -> actions [n, act_dim] (NumPy) of each agent, with noise of standard deviation `std`."""
        actions = self.actor(torch.from_numpy(obs).to(self.actor[0].bias.device)[:, None])[:, 0].tanh()
        return (actions + std * torch.randn_like(actions)).clamp(-1, 1).cpu().numpy() if std else actions.cpu().numpy()

    def update(self, obs, actions, next_obs, rewards, noise, policy_turn):
        """One gradient step on each agent's own batch [n, batch, ...]. Returns the losses, means over agents."""
        obs_actions, losses = torch.cat([obs, actions], 2), {}

        # Critics. Episodes end by time limit only, so the target always bootstraps.
        with torch.no_grad():
            actor_target, qf1_target, qf2_target = self.targets
            next_actions = (actor_target(next_obs).tanh() + noise).clamp(-1, 1)
            next_obs_actions = torch.cat([next_obs, next_actions], 2)
            qf_next = torch.min(qf1_target(next_obs_actions), qf2_target(next_obs_actions))
            next_q_value = rewards + self.args.gamma * qf_next.squeeze(2)
        qf1, qf2 = self.qf1(obs_actions).squeeze(2), self.qf2(obs_actions).squeeze(2)
        losses["qf"] = ((qf1 - next_q_value) ** 2 + (qf2 - next_q_value) ** 2).mean(1)  # [n]
        self.q_optimizer.zero_grad()
        losses["qf"].sum().backward()
        self.q_optimizer.step()

        # Policies and target networks
        if policy_turn:
            losses["actor"] = -self.qf1(torch.cat([obs, self.actor(obs).tanh()], 2)).mean((1, 2))  # [n]
            self.actor_optimizer.zero_grad()
            losses["actor"].sum().backward(inputs=list(self.actor.parameters()))  # no gradients for the Q-functions
            self.actor_optimizer.step()
            with torch.no_grad():
                sources = [*self.actor.parameters(), *self.qf1.parameters(), *self.qf2.parameters()]
                torch._foreach_lerp_(list(self.targets.parameters()), sources, self.args.tau)
        return {name: loss.detach().mean() for name, loss in losses.items()}


class StackedReplay:
    """Finished episodes of each expert, laid out as in aib_envs.History. The first row of obs is not used."""

    def __init__(self, history, buffer_size, device):
        self.episodes, self.added = buffer_size // history.rewards.shape[1], 0
        for name in ("obs", "actions", "rewards", "lengths"):
            shape, dtype = getattr(history, name).shape, getattr(torch, getattr(history, name).dtype.name)
            setattr(self, name, torch.zeros(shape[0], self.episodes, *shape[1:], dtype=dtype, device=device))

    def add(self, history):
        """Stores a finished episode, in the place of the oldest."""
        for name in ("obs", "actions", "rewards", "lengths"):
            getattr(self, name)[:, self.added % self.episodes] = torch.from_numpy(getattr(history, name))
        self.ends = self.lengths.cumsum(1)  # where each episode ends in the list of all steps of an expert
        self.added += 1

    def sample(self, batch_size):
        """Steps drawn uniformly from each expert's own: obs, actions, next_obs, rewards, all [n, batch, ...], and the
        place that they have in the tensors here. From a simulation's divergence on they are never drawn."""
        i = (torch.rand(len(self.obs), batch_size, device=self.obs.device) * self.ends[:, -1:]).long()
        episode = torch.searchsorted(self.ends, i, right=True).clamp(max=self.episodes - 1)  # max: all are empty
        t = i - self.ends.gather(1, episode) + self.lengths.gather(1, episode)
        row = torch.arange(len(self.obs), device=self.obs.device)[:, None]
        obs, next_obs = self.obs[row, episode, 1 + t], self.obs[row, episode, 2 + t]
        return obs, self.actions[row, episode, t], next_obs, self.rewards[row, episode, t], (row, episode, t)


def collect(envs, experts, args, history, env_steps):
    """Rollouts of the experts without noise, as a `StackedReplay`. Its q [n, rollouts, T] is the smaller of the values
    that an expert's two Q-functions give to its actions; its env_steps is what the experts and it have cost."""
    n, steps = history.rewards.shape
    dataset = StackedReplay(history, args.rollouts * steps, experts.actor[0].bias.device)
    for rollout in range(args.rollouts):
        history.begin()
        obs, _ = envs.reset(seed=aib_envs.reset_seeds(n, 2, args.seed, rollout))
        for _ in range(steps):
            actions = experts.act(obs)
            next_obs, rewards, _, _, infos = envs.step(actions)
            history.add(obs, actions, rewards, next_obs, infos["diverged"])
            obs = next_obs
        dataset.add(history)
    with torch.no_grad():
        parts = torch.cat([dataset.obs[:, :, 1:-1], dataset.actions], 3).unbind(1)  # one for each rollout
        dataset.q = torch.stack([torch.min(experts.qf1(x), experts.qf2(x)).squeeze(2) for x in parts], 1)
    dataset.env_steps = env_steps + args.rollouts * steps * n
    return dataset


def read_dataset(directory, args, history, device):
    """The data set of a run, whose stage 1's flags go into `args`; ends the program with one line if it cannot."""
    with aib_tools.reading(Path(directory) / "dataset.pt") as path:
        data = aib_tools.read_tensors(path)
        if data["env_id"] != args.env_id:
            raise ValueError(f"it is of {data['env_id']}, which should be {args.env_id}")
        defaults = vars(Args()) | {"total_timesteps": aib_envs.get_task(args.env_id).total_timesteps}
        for name, value in data["args"].items():
            if getattr(args, name) not in ((value,) if args.resume else (value, defaults[name])):
                raise ValueError(f"its experts had --{name.replace('_', '-')} {value}")
            setattr(args, name, value)
        dataset = StackedReplay(history, args.rollouts * history.rewards.shape[1], device)
        vars(dataset).update({k: v.to(device) if torch.is_tensor(v) else v for k, v in data["dataset"].items()})
        return dataset


# ------------------------------------- Stage 2: context -> policy and Q-function --------------------------------------


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Heads(nn.Module):
    """[n, 256] -> n networks: w1 [n, inputs, 256], b1 [n, 1, 256], w2 [n, 256, outputs], b2 [n, 1, outputs]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.first, self.last = nn.Linear(256, (inputs + 1) * WIDTH), nn.Linear(256, (WIDTH + 1) * outputs)
        for head, bound in ((self.first, 0.05), (self.last, 0.008)):
            nn.init.uniform_(head.weight, -bound, bound)
            nn.init.zeros_(head.bias)

    def forward(self, embedding):
        first = self.first(embedding).unflatten(1, (-1, WIDTH))  # the last row is the bias
        last = self.last(embedding).unflatten(1, (WIDTH + 1, -1))
        return first[:, :-1], first[:, -1:], last[:, :-1], last[:, -1:]


def apply_generated(w1, b1, w2, b2, x):
    """n generated networks, each on its own inputs: [n, batch, inputs] -> [n, batch, outputs]."""
    return torch.baddbmm(b2, F.relu(torch.baddbmm(b1, x, w1)), w2)


class TaskHypernetwork(nn.Module):
    """Contexts [n, inputs] -> for each (i, o) of `sizes` a function: n networks [n, batch, i] -> [n, batch, o]."""

    def __init__(self, inputs, sizes):
        super().__init__()
        block = lambda width: Residual(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        part = lambda i, o: nn.Sequential(nn.Linear(i, o), block(o), block(o))
        self.embed = nn.Sequential(part(inputs, 64), part(64, 128), part(128, 256))
        self.heads = nn.ModuleList(Heads(*size) for size in sizes)

    def forward(self, context):
        embedding = self.embed(context)
        return [functools.partial(apply_generated, *heads(embedding)) for heads in self.heads]


class ContextMLP(nn.Module):
    """The same, but of MLPs with the context as an input. Policy (0 in place of a) and Q-function share one layer."""

    def __init__(self, inputs, sizes):
        super().__init__()
        self.inputs = sizes[-1][0]
        self.first = nn.Linear(self.inputs + inputs, WIDTH)
        self.rest = nn.ModuleList(mlp(nn.Linear, WIDTH, o)[1:] for _, o in sizes)

    def forward(self, context):
        pad = lambda x: F.pad(x, (0, self.inputs - x.shape[2]))
        join = lambda x: torch.cat([pad(x), context[:, None].expand(-1, x.shape[1], -1)], 2)
        return [lambda x, rest=rest: rest(self.first(join(x))) for rest in self.rest]


class Agent(nn.Module):
    """What stage 2 trains. The observations that it acts on end with the scaled context."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.args, self.context_dim = args, len(aib_envs.get_task(args.env_id).dimensions)
        self.window_size = 0  # no window, so no warm-up
        obs_dim -= self.context_dim
        sizes = [(obs_dim, act_dim), (obs_dim + act_dim, 1)] if args.q else [(obs_dim, act_dim)]
        self.model = {"hyper": TaskHypernetwork, "mlp": ContextMLP}[args.model](self.context_dim, sizes)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=args.hyper_lr, fused=True)

    @torch.inference_mode()
    def act(self, obs, history, training=False):
        """obs [n, obs_dim] -> deterministic actions [n, act_dim] (all NumPy)."""
        obs, context = torch.from_numpy(obs).to(next(self.parameters()).device).tensor_split([-self.context_dim], 1)
        if history.t == 0 or not torch.equal(context, self.context):  # constant in episodes but for report.py
            self.policy, self.context = self.model(context)[0], context.clone()
        return self.policy(obs[:, None])[:, 0].tanh().cpu().numpy()

    def losses(self, context, obs, actions, next_obs, rewards, q):
        """The terms of Eqs. 4 and 5 for contexts [n, dimensions] and tuples [n, batch, ...] of each."""
        policy, *qf = self.model(context)
        losses = {"action": F.mse_loss(policy(obs).tanh(), actions)}
        if self.args.q:
            losses["value"] = F.mse_loss(qf[0](torch.cat([obs, actions], 2)).squeeze(2), q)
        if self.args.td:  # r + gamma Q(s', a') is what learns, towards the known value; a' is a constant
            next_actions = policy(next_obs).tanh().detach()
            qf_next = qf[0](torch.cat([next_obs, next_actions], 2)).squeeze(2)
            losses["td"] = F.mse_loss(rewards + self.args.gamma * qf_next, q)
        return losses

    def update(self, *batch):
        """One gradient step. Returns the losses."""
        losses = self.losses(*batch)
        self.optimizer.zero_grad()
        sum(LOSS_WEIGHTS[name] * loss for name, loss in losses.items()).backward()
        self.optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}


# --------------------------------------------------------- Run --------------------------------------------------------
# config.json, metrics.jsonl, checkpoint.pt, agent.pt and results.json in its directory. None of it is about the method.

STOP = []  # signals that have asked for an end


def open_run(args):
    """A new directory, or that of --resume; its configuration; its metrics.jsonl, which also locks it."""
    if args.resume:
        run, config = Path(args.resume), aib_tools.read_config(args.resume, Args)
    else:
        method = method_name(args)
        run = Path(args.run_dir) / f"{args.env_id}__{method}__{args.seed}__{time.time_ns() // 1_000_000}"
        config = {"run": run.name, "script": Path(__file__).name, "method": method} | aib_tools.provenance()
        run.mkdir(parents=True)
    config["args"] = {k: v for k, v in vars(args).items() if k not in ("resume", "eval_only", "context")}
    return run, config, aib_tools.lock(run / "metrics.jsonl", new=not args.resume)


def save_checkpoint(path, config, agent, buffer, progress):
    """Writes all that the next episode depends on. The environments are not in it: they begin with a reset by seed."""
    optimizers = {name: x.state_dict() for name, x in vars(agent).items() if isinstance(x, torch.optim.Optimizer)}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    state = {"agent": agent.state_dict(), "optimizers": optimizers, "buffer": vars(buffer)}
    state["origin"] = aib_tools.origin(config)
    aib_tools.write(path, state | {"generators": [torch.get_rng_state(), *cuda], "progress": progress})


def load_checkpoint(path, config, agent, buffer):
    """Takes up what `save_checkpoint` has written; returns the progress."""
    with aib_tools.reading(path):
        state = aib_tools.read_tensors(path)
        aib_tools.check_origin(state["origin"], config)
        agent.load_state_dict(state["agent"])
        for name, optimizer in state["optimizers"].items():
            getattr(agent, name).load_state_dict(optimizer)
        for name, value in state["buffer"].items():
            setattr(buffer, name, value.to(buffer.obs.device) if torch.is_tensor(value) else value)
        torch.set_rng_state(state["generators"][0])
        if torch.cuda.is_initialized():
            torch.cuda.set_rng_state_all(state["generators"][1:])
        return state["progress"]


def on_signal(number, frame):
    """SIGTERM and Ctrl-C ask for an end at the next safe point; after that, Ctrl-C ends at once."""
    STOP.append(number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.write(2, b"\nstopping at the end of the episode, or of the last evaluation\n")


# ------------------------------------------------------ Training ------------------------------------------------------


def make_envs(args, contexts, **options):
    return aib_envs.make_vec(args.env_id, contexts, observe_context="scaled", **options)


def make_agent(args, envs):
    torch.set_flush_denormal(True)  # numbers below 1e-38 would be a hundred times slower than others
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    return Agent(envs.single_observation_space.shape[0], envs.single_action_space.shape[0], args).to(device)


def capture_video(args, agent, run):
    import aib_render  # it takes MuJoCo's renderer, which training can do without

    envs = make_envs(args, [args.context] if args.context else aib_render.modes(args.env_id), render_mode="rgb_array")
    aib_render.record(envs, agent.act, agent.window_size, run / "video.gif")


def evaluate_only(args):
    """Repeats the last evaluation of a finished run, or rolls out in the one --context."""
    envs = make_envs(args, [args.context] if args.context else aib_envs.eval_contexts(args.env_id))
    run, agent = Path(args.eval_only), make_agent(args, envs)
    with aib_tools.reading(run / "agent.pt") as path:
        agent.load_state_dict(aib_tools.read_tensors(path))
    returns = aib_envs.evaluate(envs, agent.act, agent.window_size, args.eval_rollouts)
    if args.context:
        print(f"{args.context}: return {returns.mean():.1f}, from {returns.min():.1f} to {returns.max():.1f}")
    else:
        print("AER", ", ".join(f"{split} {r.mean():.1f}" for split, r in aib_envs.by_split(returns).items()))
    if args.capture_video:
        capture_video(args, agent, run)


def train(args):
    torch.manual_seed(args.seed)
    contexts, task = aib_envs.context_set(args.env_id, "train"), aib_envs.get_task(args.env_id)
    envs, expert_envs = (aib_envs.make_vec(args.env_id, contexts) for _ in range(2))
    eval_envs = make_envs(args, aib_envs.eval_contexts(args.env_id))
    agent, n = make_agent(args, eval_envs), envs.num_envs
    device = next(agent.parameters()).device
    history = aib_envs.History(n, 0, task.steps, task.obs_dim, task.act_dim)
    dataset = read_dataset(args.dataset, args, history, device) if args.dataset else None
    experts = Experts(n, task.obs_dim, task.act_dim, args).to(device)
    buffer = StackedReplay(history, args.buffer_size, device)

    run, config, metrics_file = open_run(args)
    checkpoint, clock = run / "checkpoint.pt", time.perf_counter()
    progress = 0, 0, 0, -1, {}, dict.fromkeys(("env", "update", "fit", "eval", "save"), 0.0), 0
    if checkpoint.exists():
        with aib_tools.reading(checkpoint) as path:
            in_stage_2 = aib_tools.read_tensors(path)["progress"][3] >= 0  # the epoch, which is -1 in stage 1
        dataset = dataset or (read_dataset(run, args, history, device) if in_stage_2 else None)
        progress = load_checkpoint(checkpoint, config, *((agent, dataset) if in_stage_2 else (experts, buffer)))
    global_step, env_steps, episode, epoch, losses, seconds, length = progress  # in stage 1 the epoch is -1
    saved = global_step
    aib_tools.check_resumable(run, args, global_step - max(epoch, 0), length)
    aib_tools.write(run / "config.json", config)
    metrics_file.truncate(length)  # what was written after the checkpoint will be written again
    tracker = aib_tools.start_tracking(run) if args.track else None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    bar = tqdm(initial=global_step, total=args.total_timesteps + args.epochs, unit="step", mininterval=5)
    bar.set_description(run.name.rpartition("__")[0])

    def lap(part):
        nonlocal clock
        clock, since = time.perf_counter(), clock
        seconds[part] += clock - since

    def log(metrics, text):
        lap("eval")
        metrics = {"global_step": global_step, "env_steps": env_steps} | metrics
        metrics["losses"] = {name: loss.item() for name, loss in losses.items()}
        metrics["seconds"] = {part: round(value, 2) for part, value in seconds.items()}
        metrics_file.write(json.dumps(metrics) + "\n")
        metrics_file.flush()
        bar.write(f"step {global_step}: {text}")

    def evaluate(rollouts):
        """The benchmark's protocol. AER: average episodic return of a set."""
        aib_tools.check_finite("weight", agent.state_dict(), global_step)
        returns = aib_envs.by_split(aib_envs.evaluate(eval_envs, agent.act, agent.window_size, rollouts))
        aer, by_context = ({split: r.mean(axis).tolist() for split, r in returns.items()} for axis in (None, 1))
        text = "AER " + ", ".join(f"{split} {value:.1f}" for split, value in aer.items())
        log({"epoch": epoch, "experts": expert_returns, "aer": aer, "returns": by_context}, text)
        return returns

    def save(learner, memory):
        nonlocal length, saved
        aib_tools.check_finite("weight or loss", learner.state_dict() | losses, global_step)
        length = os.path.getsize(run / "metrics.jsonl")
        progress, saved = (global_step, env_steps, episode, epoch, losses, seconds, length), global_step
        save_checkpoint(checkpoint, config, learner, memory, progress)
        lap("save")
        if STOP:
            aib_tools.fail(f"at step {global_step}; go on with: python {sys.argv[0]} --resume {run}", 128 + STOP[0])

    # Stage 1
    while not dataset and global_step < args.total_timesteps:
        history.begin()  # an episode in all training contexts in lockstep
        obs, _ = envs.reset(seed=aib_envs.reset_seeds(n, 0, args.seed, episode, 0))
        for t in range(task.steps):
            learning = episode * task.steps + t >= args.learning_starts
            std = max(1 - 0.9 * global_step / args.noise_steps, 0.1)  # of the exploration noise
            actions = experts.act(obs, std=std) if learning else 2 * torch.rand(n, task.act_dim).numpy() - 1
            next_obs, rewards, _, _, infos = envs.step(actions)
            history.add(obs, actions, rewards, next_obs, infos["diverged"])
            obs, env_steps = next_obs, env_steps + n
            lap("env")
            if not learning:
                continue
            if global_step % args.eval_every == 0:
                returns = aib_envs.evaluate(expert_envs, experts.act, 0, rollouts=1)
                log({"experts": returns[:, 0].tolist()}, f"experts' mean return {returns.mean():.1f}")
            if global_step % UPDATE_EVERY == 0:
                *batch, _ = buffer.sample(args.batch_size)
                noise = (std * torch.randn_like(batch[1])).clamp(-0.3, 0.3)  # of the target policies
                losses |= experts.update(*batch, noise, global_step % (UPDATE_EVERY * POLICY_DELAY) == 0)
                aib_tools.check_finite("loss", losses, global_step)
                lap("update")
            global_step += 1
            bar.update()
            if global_step == args.total_timesteps:
                break
        buffer.add(history)
        episode += 1
        if global_step < args.total_timesteps and (STOP or global_step // args.eval_every > saved // args.eval_every):
            save(experts, buffer)

    if not dataset:
        aib_tools.check_finite("weight", experts.state_dict(), global_step)
        dataset = collect(expert_envs, experts, args, history, env_steps)
        flags = {name: getattr(args, name) for name in (*STAGE_1, "rollouts")}
        aib_tools.write(run / "dataset.pt", {"env_id": args.env_id, "args": flags, "dataset": vars(dataset)})
        lap("eval")
    expert_returns = dataset.rewards.double().sum(2).mean(1).tolist()

    if epoch < 0:  # stage 2 begins
        torch.manual_seed(args.seed)  # so that --dataset gives the same stage 2
        global_step, env_steps, epoch, losses, saved = args.total_timesteps, dataset.env_steps, 0, {}, -1
    order = torch.randperm(n, generator=torch.Generator().manual_seed(args.seed))
    held_out, seen = (sorted(part.tolist()) for part in order.tensor_split([min(round(args.held_out * n), n - 1)]))
    vectors = [aib_envs.context_vector(args.env_id, contexts[i], scaled=True).tolist() for i in seen]
    vectors, batch_size = torch.tensor(vectors, device=device), -(-args.hyper_batch_size // len(seen))
    while epoch < args.epochs:
        if global_step > saved and (STOP or epoch % args.eval_epochs == 0):
            save(agent, dataset)
        if epoch % args.eval_epochs == 0:
            evaluate(rollouts=1)
        for _ in range(-(-dataset.rewards[0].numel() // batch_size)):
            *batch, place = dataset.sample(batch_size)  # [n, batch, ...]: each context's network is generated once
            losses = agent.update(vectors, *(x[seen] for x in (*batch, dataset.q[place])))
        aib_tools.check_finite("loss", losses, global_step)
        lap("fit")
        epoch, global_step = epoch + 1, global_step + 1  # vector steps of stage 1, and one for each epoch
        bar.update()
    if global_step > saved:
        save(agent, dataset)

    returns = {split: r.tolist() for split, r in evaluate(args.eval_rollouts).items()}  # [20, rollouts]
    bar.close()
    aib_tools.write(run / "agent.pt", agent.state_dict())
    contexts = {split: aib_envs.context_set(args.env_id, split) for split in aib_envs.SPLITS}
    results = {"method": config["method"], "args": config["args"], "contexts": contexts, "returns": returns}
    aib_tools.write(run / "results.json", results | {"experts": expert_returns, "held_out": held_out})
    if not args.keep_checkpoint:
        checkpoint.unlink(missing_ok=True)
    if args.capture_video:
        capture_video(args, agent, run)
    if tracker:
        aib_tools.stop_tracking(tracker)
    print(f"results: {run / 'results.json'}")


if __name__ == "__main__":
    try:
        args = aib_tools.parse_args(Args, __doc__)
        evaluate_only(args) if args.eval_only else train(args)
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:  # a full disk, a full GPU, a read-only directory
        aib_tools.fail(error)
    except KeyboardInterrupt:
        aib_tools.fail("stopped at once", 130)
