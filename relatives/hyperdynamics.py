"""HyperDynamics (Xian et al., ICLR 2021, arXiv 2103.09439): planning with generated models, in one file.

The agent meets a world whose dynamics (context) change from episode to episode, and nobody tells it how. An encoder
turns the last 16 transitions into a small code, a hypernetwork the code into a whole forward model of this world, and
the agent plans with it (model-predictive control, MPC); there is no policy. --model takes another model instead: one
for all contexts without a code (global), with the code as an input (concat) or with a recurrent state (recurrent), or
one for each training context (expert). A round is one episode in all 20 training contexts in lockstep, after which the
model is fitted to all data; the first rounds are of random actions. Start it with: python hyperdynamics.py --env-id DI
"""

import functools
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import aib_envs
import aib_tools

# ----------------------------------------------------- Arguments ------------------------------------------------------


@dataclass
class Args:
    env_id: str = "DI"  # the task: DI, DI-Friction, DI-Perm, ODE, ODE-1 ... ODE-20, Cartpole, Cheetah, ... (see README)
    seed: int = 1  # seed of the run
    total_timesteps: int | None = 10_000  # vector steps (one in every context) with MPC
    cuda: bool = True  # use a GPU if there is one
    run_dir: str = "runs"  # where the run's own directory is made
    eval_every: int = 2_500  # steps between evaluations with 1 rollout per context
    eval_rollouts: int = 10  # rollouts per context of the last evaluation
    resume: str | None = None  # directory of a run to go on with; more --total-timesteps extend a finished one
    keep_checkpoint: bool = False  # keep the checkpoint of a finished run, so that it can be extended
    eval_only: str | None = None  # directory of a finished run, whose last evaluation is repeated
    context: tuple[str, ...] = ()  # with --eval-only: the one context to roll out in, as in length=1.3 inversion=-1
    capture_video: bool = False  # at the end, record an episode as video.gif: in --context, or in both modes
    track: bool = False  # send metrics and video to Weights & Biases
    learning_starts: int = 2_000  # vector steps with random actions that come first, rounded up to whole episodes
    buffer_size: int = 100_000  # transitions per context in the replay buffer
    batch_size: int = 128  # transitions per gradient step (of each expert)
    lr: float = 1e-3  # learning rate
    updates_per_round: int = 2_000  # gradient steps after each episode, the random ones included
    model: Literal["hyper", "global", "concat", "recurrent", "expert"] = "hyper"  # what predicts the next state
    code_dim: int = 8  # size of the code of models hyper and concat
    planner: Literal["shooting", "cem"] = "shooting"  # random shooting, or the cross-entropy method
    candidates: int = 500  # action sequences that are compared (by CEM: in each of its 5 iterations)
    horizon: int = 20  # steps that the planner looks ahead
    action_hold: int = 10  # steps for which a candidate holds each of its random actions (the paper: 1)
    predict_only: bool = False  # no MPC: all actions are random, also those of the returns; for tasks without a reward


WIDTH, WINDOW = 128, 16  # size of the networks' layers; transitions from which the context is inferred
CEM_ITERATIONS = 5  # after each of which the next candidates are drawn around the best tenth


def method_name(args):
    if args.env_id not in REWARDS and not args.predict_only:
        aib_tools.fail(f"the planner knows no reward of {args.env_id}: --predict-only, or {', '.join(REWARDS)}")
    name = "HyperDynamics" + f"-{args.model}" * (args.model != "hyper")
    return name + ("-random" if args.predict_only else "-cem" * (args.planner == "cem"))


# ------------------------------------------------ Rewards of the planner ----------------------------------------------
# Functions of obs [..., obs_dim], action [..., act_dim] and next_obs that give the environment's reward [...]. Those of
# dm_control's tasks are written with its `tolerance`: 1 within bounds and, where there is a margin, at a distance of d
# margins either 0.1 ** (d * d) (gaussian) or max(1 - d * d, 0) (quadratic).


def ode_reward(obs, action, next_obs):
    bounds = torch.tensor([0.05, 0.1, 0.2, 0.5, 2.0], device=next_obs.device)
    levels = torch.tensor([1.0, 1 / 2, 1 / 3, 1 / 4, 0.05, 0.0], device=next_obs.device)
    return levels[torch.bucketize(next_obs[..., 0].abs(), bounds, right=True)]


def cartpole_reward(obs, action, next_obs):
    position, cosine, _, _, angular_velocity = next_obs.unbind(-1)
    upright, centered = (cosine.clamp(-1, 1) + 1) / 2, (1 + 0.1 ** (position / 2).square()) / 2
    small_control = (4 + (1 - action[..., 0].square()).clamp(min=0)) / 5
    small_velocity = (1 + 0.1 ** (angular_velocity / 5).square()) / 2
    return upright * small_control * small_velocity * centered


def distance_reward(obs, action, next_obs, start, limit):  # by the vector of two entries from `start` on
    return (next_obs[..., start : start + 2].norm(dim=-1) <= limit).float()


REWARDS = {  # by task; those that are not here have rewards that do not follow from the observations
    **dict.fromkeys(("DI", "DI-Friction", "DI-Perm"), functools.partial(distance_reward, start=0, limit=0.1)),
    **dict.fromkeys(("ODE", *(f"ODE-{k}" for k in range(1, 21))), ode_reward),
    "Cartpole": cartpole_reward,
    "Reacher-E": functools.partial(distance_reward, start=2, limit=0.06),  # finger to target, radii of both [m]
    **dict.fromkeys(("Reacher-H", "Reacher-H-Perm"), functools.partial(distance_reward, start=2, limit=0.025)),
}

# -------------------------- Networks: encoder, hypernetwork and the forward models that it generates ------------------
# A forward model maps normalised (s, a) to the normalised state difference. It is a list of matrices [in + 1, out], one
# for each layer, the last row being the bias; or of stacks of them [n, in + 1, out], for n environments or experts.


def new_model(inputs, outputs, *stack):
    """A forward model, or a stack of them, which starts as layers of PyTorch do."""
    shapes = (inputs + 1, WIDTH), (WIDTH + 1, WIDTH), (WIDTH + 1, outputs)
    return nn.ParameterList(torch.empty(*stack, i, o).uniform_(-1, 1) / (i - 1) ** 0.5 for i, o in shapes)


def forward_model(model, x):
    """x [..., m, in] -> [..., m, out]. A stack of models takes a stack of inputs, in one matrix product a layer."""
    for matrix in model:
        x = (x @ matrix[..., :-1, :]).add_(matrix[..., -1:, :])
        x = x if matrix is model[-1] else torch.relu_(x)
    return x


class Hypernetwork(nn.Module):
    """One linear layer from the code to all parameters of a forward model: for each of that model's matrices there is
    one matrix for each entry of the code, which starts with standard deviation 0.1 (the paper's), and one that is added
    always, which starts at 0. So generated parameters start with a standard deviation of 0.1 times the code's norm."""

    def __init__(self, code_dim, inputs, outputs):
        super().__init__()
        self.heads = new_model(inputs, outputs, code_dim + 1)  # each [code_dim + 1, in + 1, out]
        for head in self.heads:
            nn.init.zeros_(nn.init.normal_(head, std=0.1)[-1])

    def generate(self, code):
        """A stack of models, one for each code [n, code_dim]: where a code has many inputs."""
        code = F.pad(code, (0, 1), value=1.0)
        return [torch.einsum("nc,cio->nio", code, head) for head in self.heads]

    def forward(self, code, x):
        """What the model of each code [..., code_dim] makes of its x [..., in]: where a code has one input. The models
        are not built, for their layers are linear in the products of the code's entries with the input's."""
        code = F.pad(code, (0, 1), value=1.0)
        for head in self.heads:
            products = code[..., None] * F.pad(x, (0, 1), value=1.0)[..., None, :]  # [..., code_dim + 1, in + 1]
            x = products.flatten(-2) @ head.flatten(0, 1)
            x = x if head is self.heads[-1] else torch.relu_(x)
        return x


# ---------------------------------------------------- Replay buffer ---------------------------------------------------


class EpisodeBuffer:
    """Finished episodes of all contexts, laid out as in aib_envs.History: obs holds the warm-up's K + 1 observations,
    then the episode's T + 1; actions the warm-up's K, then the episode's T."""

    def __init__(self, history, buffer_size, device):
        self.window_size, self.episodes, self.added = history.window_size, buffer_size // history.rewards.shape[1], 0
        for name in ("obs", "actions", "lengths"):
            shape, dtype = getattr(history, name).shape, getattr(torch, getattr(history, name).dtype.name)
            setattr(self, name, torch.zeros(shape[0], self.episodes, *shape[1:], dtype=dtype, device=device))

    def add(self, history):
        """Stores a finished episode, in the place of the oldest."""
        for name in ("obs", "actions", "lengths"):
            getattr(self, name)[:, self.added % self.episodes] = torch.from_numpy(getattr(history, name))
        self.added += 1

    def at(self, row, t):
        """Steps t [...] of the episodes row [...] (context * episodes + episode): obs, actions and next_obs
        [..., dim], and their strictly past windows: (obs, actions) [..., K, dim]."""
        k, obs, actions = self.window_size, self.obs.flatten(0, 2), self.actions.flatten(0, 2)
        obs_at, actions_at = row * self.obs.shape[2], row * self.actions.shape[2]  # where these episodes begin
        past = t[..., None] + torch.arange(k, device=t.device)  # step t itself is transition K + t
        window = obs[obs_at[..., None] + past + (past >= k)], actions[actions_at[..., None] + past]
        now = obs_at + t + k + 1
        return obs[now], actions[actions_at + t + k], obs[now + 1], window

    def sample(self, batch_size, each_context=False):
        """Steps drawn uniformly from all finished episodes [batch], or from each context's [n, batch]: as in `at`."""
        lengths = self.lengths if each_context else self.lengths.flatten()[None]
        ends = lengths.cumsum(1)  # where each episode ends in one list of all steps
        i = (torch.rand(len(ends), batch_size, dtype=torch.float64, device=ends.device) * ends[:, -1:]).long()
        row = torch.searchsorted(ends, i, right=True).clamp(max=ends.shape[1] - 1)  # the episode of i (max: no steps)
        t = i - ends.gather(1, row) + lengths.gather(1, row)
        row += torch.arange(len(ends), device=ends.device)[:, None] * lengths.shape[1]
        return self.at(row, t) if each_context else self.at(row[0], t[0])


# ------------------------------------------------ Acting and learning -------------------------------------------------


class Agent(nn.Module):
    """With --model expert, observations end with the true (scaled) context. The models do not see it: it tells which
    expert is asked, the one of the nearest training context."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.args, self.act_dim, self.obs_dim = args, act_dim, aib_envs.get_task(args.env_id).obs_dim
        inputs, contexts = self.obs_dim + act_dim, aib_envs.context_set(args.env_id, "train")
        code_dim = {"hyper": args.code_dim, "concat": args.code_dim, "recurrent": WIDTH}.get(args.model, 0)
        self.window_size = WINDOW if code_dim else 0  # without a window no warm-up
        if args.model == "recurrent":
            self.history_encoder = nn.GRU(inputs, WIDTH, batch_first=True)
        elif code_dim:
            layers = nn.Linear(WINDOW * inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()
            self.history_encoder = nn.Sequential(nn.Flatten(-2), *layers, nn.Linear(WIDTH, code_dim))
        if args.model == "hyper":
            self.hypernetwork, self.model = Hypernetwork(code_dim, inputs, self.obs_dim), None
        else:
            self.model = new_model(inputs + code_dim, self.obs_dim, *[len(contexts)] * (args.model == "expert"))
        vectors = [aib_envs.context_vector(args.env_id, context, scaled=True) for context in contexts]
        self.register_buffer("contexts", torch.from_numpy(np.stack(vectors)))
        self.register_buffer("mean", torch.zeros(inputs + self.obs_dim))  # of obs, actions and state differences
        self.register_buffer("std", torch.ones(inputs + self.obs_dim))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=args.lr, fused=True, capturable=True)

    def set_scales(self, obs, actions, next_obs):
        """Takes over mean and standard deviation of the data [steps, dim]."""
        x = torch.cat([obs[:, : self.obs_dim], actions, (next_obs - obs)[:, : self.obs_dim]], 1)
        self.mean.copy_(x.mean(0))
        self.std.copy_(x.std(0).clamp(min=1e-6))

    def normalise(self, obs, actions):
        """(s, a) [..., inputs], without the true context."""
        x = torch.cat([obs[..., : self.obs_dim], actions], -1)
        return (x - self.mean[: -self.obs_dim]) / self.std[: -self.obs_dim]

    def infer(self, window, known=1.0):
        """The code [..., code_dim] of a window (obs, actions) [..., K, dim], of which only a part may be `known` (1).
        For models without a window it is empty."""
        if not self.window_size:
            return window[0].new_empty(*window[0].shape[:-2], 0)
        x = self.normalise(*window) * known
        if self.args.model == "recurrent":
            return self.history_encoder(x.flatten(0, -3))[0][:, -1].unflatten(0, x.shape[:-2])  # the last state
        return self.history_encoder(x)

    def models(self, obs, code):
        """Forward models of n environments, a stack or one for all, and the code [n, ...] that is still an input."""
        if self.args.model == "hyper":
            return self.hypernetwork.generate(code), code[..., :0]
        if self.args.model == "expert":
            nearest = (obs[:, None, self.obs_dim :] - self.contexts).square().sum(-1).argmin(1)
            return [matrices[nearest] for matrices in self.model], code
        return self.model, code

    def predict(self, obs, actions, code, model):
        """State differences [..., m, obs_dim] that follow from obs and actions [..., m, dim]. `model` None: by what the
        hypernetwork makes of the code of each of them."""
        x = self.normalise(obs, actions)
        deltas = forward_model(model, torch.cat([x, code], -1)) if model else self.hypernetwork(code, x)
        return deltas * self.std[-self.obs_dim :] + self.mean[-self.obs_dim :]

    def update(self, obs, actions, next_obs, window):
        """One gradient step on a sampled batch. Returns the losses."""
        errors = self.predict(obs, actions, self.infer(window), self.model) - (next_obs - obs)[..., : self.obs_dim]
        loss = (errors / self.std[-self.obs_dim :]).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"dynamics": loss.detach()}

    @torch.inference_mode()
    def act(self, obs, history, training=False):
        """obs [n, obs_dim] -> actions [n, act_dim] (all NumPy), planned anew at every step. In evaluation the planner's
        random numbers depend only on the step of the episode and on an environment's place among the n."""
        device, positions = self.mean.device, np.arange(self.window_size)
        to = lambda x: torch.from_numpy(x).to(device)
        generator = None if training else torch.Generator(device).manual_seed(history.t + WINDOW)
        if self.args.predict_only:
            return 2 * torch.rand(len(obs), self.act_dim, generator=generator, device=device).cpu().numpy() - 1
        known = to((history.t + positions >= 0).astype(np.float32)[:, None])
        code = self.infer([to(x) for x in history.window(positions[None])[:2]], known)
        some = max(2_500 // self.args.candidates, 1) if device.type == "cpu" else len(obs)  # what a cache can hold
        pairs = zip(to(obs).split(some), code.split(some), strict=True)
        return torch.cat([self.plan(*pair, generator) for pair in pairs]).cpu().numpy()

    def plan(self, obs, code, generator):
        """The first action [n, act_dim] of the best of many random plans for each obs [n, ...]. A plan is a few actions
        that are held for --action-hold steps each; the best one promises the greatest sum of rewards."""
        n, m, count = len(obs), self.args.candidates, -(-self.args.horizon // self.args.action_hold)
        (model, code), row = self.models(obs, code), torch.arange(n, device=obs.device)
        plans = 2 * torch.rand(n, m, count, self.act_dim, generator=generator, device=obs.device) - 1
        for _ in range(CEM_ITERATIONS - 1 if self.args.planner == "cem" else 0):
            returns = self.rollout(obs, code, model, plans)
            elites = plans[row[:, None], returns.topk(max(m // 10, 1)).indices]  # [n, m // 10, count, act_dim]
            noise = torch.randn(plans.shape, generator=generator, device=obs.device)
            plans = (elites.mean(1, True) + elites.std(1, correction=0, keepdim=True) * noise).clamp_(-1, 1)
            plans[:, 0] = elites[:, 0]  # the best so far
        return plans[row, self.rollout(obs, code, model, plans).argmax(1), 0]

    def rollout(self, obs, code, model, plans):
        """Predicted returns [n, m] of m plans [n, m, count, act_dim] for each of n environments, all at once."""
        n, m, reward = *plans.shape[:2], REWARDS[self.args.env_id]
        returns = torch.zeros(n, m, device=obs.device)
        obs, code = obs[:, None, : self.obs_dim].expand(n, m, -1), code[:, None].expand(n, m, -1)
        for step in range(self.args.horizon):
            actions = plans[:, :, step // self.args.action_hold]
            next_obs = obs + self.predict(obs, actions, code, model)
            returns += reward(obs, actions, next_obs)
            obs = next_obs
        return returns.nan_to_num(0.0, 0.0, 0.0)  # of predictions that are not finite

    @torch.inference_mode()
    def prediction_errors(self, episodes, steps=20, starts=25):
        """Mean squared errors by set, from a few times in `episodes` of the 60 evaluation contexts: of the normalised
        difference of one step, and of the state predicted 20 steps ahead in units of the data's standard deviation."""
        n, d, device = len(episodes.lengths), self.obs_dim, episodes.obs.device
        t = torch.linspace(0, episodes.lengths.max() - steps, starts, device=device).long().expand(n, starts)
        row = torch.arange(n, device=device)[:, None].expand(n, starts)
        obs, _, _, window = episodes.at(row, t)
        code, predicted, errors = self.infer(window), obs[..., :d], []
        model, code = (None, code) if self.args.model == "hyper" else self.models(obs[:, 0], code)
        for step in range(steps):
            _, actions, next_obs, _ = episodes.at(row, t + step)
            predicted = predicted + self.predict(predicted, actions, code, model)
            errors.append((predicted - next_obs[..., :d]).reshape(3, -1, d))  # by set
        errors = {"one_step": errors[0] / self.std[-d:], "twenty_step": errors[-1] / self.std[:d]}
        valid = (t + steps <= episodes.lengths).reshape(3, -1)  # what does not reach beyond a divergence
        mean = lambda x, i: x[i, valid[i]].square().mean().item()
        return {name: {split: mean(x, i) for i, split in enumerate(aib_envs.SPLITS)} for name, x in errors.items()}


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
    observe_context = "scaled" if args.model == "expert" else None
    return aib_envs.make_vec(args.env_id, contexts, observe_context=observe_context, **options)


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


def random_episodes(envs, device):
    """An episode of uniform random actions in each environment, after a warm-up: always the same ones."""
    histories = []
    envs.action_space.seed(0)
    aib_envs.evaluate(envs, lambda _, history: histories.append(history) or envs.action_space.sample(), WINDOW, 1)
    episodes = EpisodeBuffer(histories[0], histories[0].rewards.shape[1], device)
    episodes.add(histories[0])
    return episodes


def train(args):
    torch.manual_seed(args.seed)
    envs = make_envs(args, aib_envs.context_set(args.env_id, "train"))
    eval_envs = make_envs(args, aib_envs.eval_contexts(args.env_id))
    agent, n = make_agent(args, envs), envs.num_envs
    obs_dim, act_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    device = agent.mean.device
    update = aib_tools.CudaGraph(agent.update) if device.type == "cuda" else agent.update
    window, steps = agent.window_size, aib_envs.get_task(args.env_id).steps
    history = aib_envs.History(n, window, steps, obs_dim, act_dim)
    buffer = EpisodeBuffer(history, args.buffer_size, device)

    run, config, metrics_file = open_run(args)
    checkpoint, clock = run / "checkpoint.pt", time.perf_counter()
    progress = 0, 0, 0, {}, dict.fromkeys(("act", "env", "sample", "update", "eval", "save"), 0.0), 0
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, config, agent, buffer)
    global_step, env_steps, episode, losses, seconds, length = progress
    saved = global_step
    aib_tools.check_resumable(run, args, global_step, length)
    aib_tools.write(run / "config.json", config)
    metrics_file.truncate(length)  # what was written after the checkpoint will be written again
    tracker = aib_tools.start_tracking(run) if args.track else None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    bar = tqdm(initial=global_step, total=args.total_timesteps, unit="step", mininterval=5)
    bar.set_description(run.name.rpartition("__")[0])

    def lap(part):
        nonlocal clock
        clock, since = time.perf_counter(), clock
        seconds[part] += clock - since

    def evaluate(rollouts):
        """The benchmark's protocol; writes and shows one line of metrics. AER: average episodic return of a set."""
        aib_tools.check_finite("weight", agent.state_dict(), global_step)
        returns = aib_envs.by_split(aib_envs.evaluate(eval_envs, agent.act, window, rollouts))
        metrics = {
            "global_step": global_step,
            "env_steps": env_steps,
            "aer": {split: r.mean() for split, r in returns.items()},
            "returns": {split: r.mean(1).tolist() for split, r in returns.items()},
            "prediction": agent.prediction_errors(episodes),
            "losses": {name: loss.item() for name, loss in losses.items()},
        }
        lap("eval")
        metrics["seconds"] = {part: round(value, 2) for part, value in seconds.items()}
        metrics_file.write(json.dumps(metrics) + "\n")
        metrics_file.flush()
        aer = ", ".join(f"{split} {value:.1f}" for split, value in metrics["aer"].items())
        bar.write(f"step {global_step}: AER {aer}")
        bar.set_postfix_str(aer)
        return returns

    episodes = random_episodes(eval_envs, device)
    lap("eval")
    while global_step < args.total_timesteps:
        # An episode in all training contexts in lockstep; before it a warm-up (t < 0, own reset) that fills the window.
        history.begin()
        learning = episode * steps >= args.learning_starts
        for t in range(-window, steps):
            if t in (-window, 0):
                obs, _ = envs.reset(seed=aib_envs.reset_seeds(n, 0, args.seed, episode, int(t < 0)))
            if t >= 0 and learning and global_step % args.eval_every == 0:
                evaluate(rollouts=1)
            uniform = 2 * torch.rand(n, act_dim).numpy() - 1
            actions = agent.act(obs, history, training=True) if learning else uniform
            lap("act")
            next_obs, rewards, _, _, infos = envs.step(actions)
            history.add(obs, actions, rewards, next_obs, infos["diverged"])
            obs, env_steps = next_obs, env_steps + n
            lap("env")
            if t >= 0 and learning:
                global_step += 1
                bar.update()
                if global_step == args.total_timesteps:
                    break
        if t < steps - 1:
            break  # the end came in the middle of an episode, where there is no checkpoint
        buffer.add(history)
        episode += 1
        agent.set_scales(*buffer.sample(10_000)[:3])
        for i in range(args.updates_per_round):  # fits the model to all data
            batch = buffer.sample(args.batch_size, args.model == "expert")
            lap("sample")
            losses |= update(*batch)
            if device.type == "cpu" or i % 100 == 0:  # a check waits for a GPU
                aib_tools.check_finite("loss", losses, global_step)
            lap("update")

        ended = global_step == args.total_timesteps
        if STOP or ended or global_step // args.eval_every > saved // args.eval_every:
            aib_tools.check_finite("weight or loss", agent.state_dict() | losses, global_step)
            length = os.path.getsize(run / "metrics.jsonl")
            progress = global_step, env_steps, episode, losses, seconds, length
            save_checkpoint(checkpoint, config, agent, buffer, progress)
            saved = global_step
            lap("save")
        if STOP and not ended:
            aib_tools.fail(f"at step {global_step}; go on with: python {sys.argv[0]} --resume {run}", 128 + STOP[0])

    returns = {split: r.tolist() for split, r in evaluate(args.eval_rollouts).items()}  # [20, rollouts]
    bar.close()
    aib_tools.write(run / "agent.pt", agent.state_dict())
    contexts = {split: aib_envs.context_set(args.env_id, split) for split in aib_envs.SPLITS}
    results = {"method": config["method"], "args": config["args"], "contexts": contexts, "returns": returns}
    aib_tools.write(run / "results.json", results)
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
