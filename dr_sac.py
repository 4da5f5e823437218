"""DR: soft actor-critic with domain randomisation, a baseline of arXiv 2602.06550, in one file.

The agent meets a world whose dynamics (context) change from episode to episode, and nobody tells it how. It trains in
all training contexts at once and has to find one policy that does for all of them. With --context-aware it is Concat:
it is told the true context, which is appended to the observation. Start it with: python dr_sac.py --env-id DI
"""

import contextlib
import copy
import io
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

import aib_envs

# ----------------------------------------------------- Arguments ------------------------------------------------------


@dataclass
class Args:
    env_id: str = "DI"  # the task: DI, DI-Friction, DI-Perm, ODE, ODE-1 ... ODE-20, Cartpole, Cheetah, ... (see README)
    seed: int = 1  # seed of the run
    total_timesteps: int | None = None  # vector steps (one in every context) = gradient steps; default: the task's own
    cuda: bool = True  # use a GPU if there is one
    run_dir: Path = Path("runs")  # where the run's own directory is made
    eval_every: int = 5_000  # steps between evaluations with 1 rollout per context
    eval_rollouts: int = 10  # rollouts per context of the last evaluation
    learning_starts: int = 5_000  # vector steps with random actions that come before the first gradient step
    buffer_size: int = 100_000  # transitions per context in the replay buffer
    batch_size: int = 256  # transitions per gradient step
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # smoothing coefficient of the target networks
    policy_lr: float = 3e-4  # learning rate of the policy
    q_lr: float = 1e-3  # learning rate of the Q-functions and the temperature
    context_aware: bool = False  # append the true context to the observation (Concat)
    scale_context: bool = False  # scale that context by its outer range, binaries to -1 and 1


POLICY_FREQUENCY = 2  # the policy is updated every second gradient step, twice
WIDTH = 256  # size of the networks' layers


def method_name(args):
    if args.scale_context and not args.context_aware:
        fail("--scale-context needs --context-aware")
    return ("Concat" if args.context_aware else "DR") + "-scaled" * args.scale_context


def fail(message):
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args():
    console = io.StringIO()
    try:
        with contextlib.redirect_stderr(console):
            args = tyro.cli(Args, description=__doc__)
        task = aib_envs.get_task(args.env_id)
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [line.strip("│ ─") for line in console.getvalue().splitlines() if line.startswith("│")]
        fail(" ".join(filter(None, lines)))  # tyro draws a box of several lines
    except ValueError as error:
        fail(error)
    if args.total_timesteps is None:
        args.total_timesteps = task.total_timesteps
    at_least = {"seed": 0, "learning_starts": task.steps, "buffer_size": task.steps}  # sampling needs a whole episode
    for name, value in vars(args).items():
        low, high = (0, 1) if isinstance(value, float) else (at_least.get(name, 1), 2**32 - 1)
        if type(value) in (int, float) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} must be from {low} to {high} for {args.env_id}; got {value}")
    return args


# ------------------------------------ Networks: policy (xi) and Q-functions (zeta) ------------------------------------


class MLP(nn.Module):
    """Trunk of two layers and head."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, outputs)

    def forward(self, x):  # [batch, inputs] -> [batch, outputs]
        return self.head(F.relu(self.trunk(x)))


class Actor(MLP):
    """Gaussian policy, squashed into (-1, 1) by tanh. The head gives mean and log standard deviation."""

    def forward(self, obs):
        mean, log_std = super().forward(obs).chunk(2, dim=1)
        return mean, -5 + 3.5 * (torch.tanh(log_std) + 1)  # log standard deviation in [-5, 2]

    def get_action(self, obs):
        """A sampled action [batch, act_dim] and its log-probability [batch]."""
        mean, log_std = self(obs)
        normal = torch.distributions.Normal(mean, log_std.exp(), validate_args=False)
        x = normal.rsample()
        action = torch.tanh(x)
        log_prob = normal.log_prob(x) - torch.log(1 - action.pow(2) + 1e-6)  # tanh changes the density
        return action, log_prob.sum(1)


# ---------------------------------------------------- Replay buffer ---------------------------------------------------


class ReplayBuffer:
    """Finished episodes of all contexts, laid out as in aib_envs.History: obs holds one unused row, then the episode's
    T + 1 observations."""

    def __init__(self, history, buffer_size, device):
        self.episodes, self.added = buffer_size // history.rewards.shape[1], 0
        for name in ("obs", "actions", "rewards", "lengths"):
            shape, dtype = getattr(history, name).shape, getattr(torch, getattr(history, name).dtype.name)
            setattr(self, name, torch.zeros(shape[0], self.episodes, *shape[1:], dtype=dtype, device=device))

    def add(self, history):
        """Stores a finished episode, in the place of the oldest."""
        for name in ("obs", "actions", "rewards", "lengths"):
            getattr(self, name)[:, self.added % self.episodes] = torch.from_numpy(getattr(history, name))
        self.ends = self.lengths.flatten().cumsum(0)  # where each episode ends in one list of all steps
        self.total = int(self.ends[-1])
        self.added += 1

    def sample(self, batch_size):
        """Steps drawn uniformly from all finished episodes: obs, actions, next_obs, rewards, all [batch, ...]."""
        i = torch.randint(self.total, (batch_size,), device=self.obs.device)
        row = torch.searchsorted(self.ends, i, right=True)  # the episode that step i lies in
        t = i - self.ends[row] + self.lengths.flatten()[row]
        obs, actions, rewards = self.obs.flatten(0, 1), self.actions.flatten(0, 1), self.rewards.flatten(0, 1)
        return obs[row, 1 + t], actions[row, t], obs[row, 2 + t], rewards[row, t]


# ------------------------------------------------ Acting and learning -------------------------------------------------


class Agent(nn.Module):
    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.args, self.target_entropy = args, -act_dim
        self.window_size = 0  # no window, so no warm-up
        self.actor = Actor(obs_dim, 2 * act_dim)
        self.qf1, self.qf2 = MLP(obs_dim + act_dim, 1), MLP(obs_dim + act_dim, 1)
        self.qf1_target, self.qf2_target = copy.deepcopy(self.qf1), copy.deepcopy(self.qf2)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.q_optimizer = torch.optim.Adam([*self.qf1.parameters(), *self.qf2.parameters()], lr=args.q_lr)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=args.policy_lr)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=args.q_lr)

    @torch.no_grad()
    def act(self, obs, history, training):
        """obs [n, obs_dim] -> actions [n, act_dim]: sampled in training, deterministic in evaluation (all NumPy)."""
        to = lambda x: torch.from_numpy(x).to(self.log_alpha.device)
        actions = self.actor.get_action(to(obs))[0] if training else self.actor(to(obs))[0].tanh()
        return actions.cpu().numpy()

    def update(self, obs, actions, next_obs, rewards, global_step):
        """One gradient step on a sampled batch. Returns the losses."""
        obs_actions, losses = torch.cat([obs, actions], 1), {}

        # Critics. Episodes end by time limit only, so the target always bootstraps.
        with torch.no_grad():
            next_actions, next_log_pi = self.actor.get_action(next_obs)
            next_obs_actions = torch.cat([next_obs, next_actions], 1)
            qf_next = torch.min(self.qf1_target(next_obs_actions), self.qf2_target(next_obs_actions))
            next_q_value = rewards + self.args.gamma * (qf_next.squeeze(1) - self.log_alpha.exp() * next_log_pi)
        qf1, qf2 = self.qf1(obs_actions).squeeze(1), self.qf2(obs_actions).squeeze(1)
        losses["qf"] = F.mse_loss(qf1, next_q_value) + F.mse_loss(qf2, next_q_value)
        self.q_optimizer.zero_grad()
        losses["qf"].backward()
        self.q_optimizer.step()

        # Policy and temperature
        for _ in range(POLICY_FREQUENCY if global_step % POLICY_FREQUENCY == 0 else 0):
            pi, log_pi = self.actor.get_action(obs)
            obs_pi = torch.cat([obs, pi], 1)
            min_qf_pi = torch.min(self.qf1(obs_pi), self.qf2(obs_pi)).squeeze(1)
            losses["actor"] = (self.log_alpha.exp().detach() * log_pi - min_qf_pi).mean()
            self.actor_optimizer.zero_grad()
            losses["actor"].backward(inputs=list(self.actor.parameters()))  # no gradients for the Q-functions
            self.actor_optimizer.step()

            losses["alpha"] = (-self.log_alpha.exp() * (log_pi.detach() + self.target_entropy)).mean()
            self.alpha_optimizer.zero_grad()
            losses["alpha"].backward()
            self.alpha_optimizer.step()

        # Target networks
        with torch.no_grad():
            targets = [*self.qf1_target.parameters(), *self.qf2_target.parameters()]
            torch._foreach_lerp_(targets, [*self.qf1.parameters(), *self.qf2.parameters()], self.args.tau)
        return {name: loss.detach() for name, loss in losses.items()}


# ------------------------------------------------------ Training ------------------------------------------------------


def write_json(path, content):
    path.with_suffix(".tmp").write_text(json.dumps(content, default=str, indent=1))
    path.with_suffix(".tmp").replace(path)  # a whole file or none


def make_run(args):
    """Makes the run's own directory, with its config.json."""
    method = method_name(args)
    run = args.run_dir / f"{args.env_id}__{method}__{args.seed}__{time.time_ns() // 1_000_000}"
    commit = subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD 2>/dev/null")
    versions = {name: version(name) for name in ("torch", "numpy", "mujoco", "dm_control", "gymnasium")}
    run.mkdir(parents=True)
    write_json(run / "config.json", {"method": method, "args": vars(args), "versions": versions, "commit": commit})
    return run


def make_envs(args):
    observe = ("scaled" if args.scale_context else "raw") if args.context_aware else None
    envs = aib_envs.make_vec(args.env_id, aib_envs.context_set(args.env_id, "train"), observe)
    return envs, aib_envs.make_eval_envs(args.env_id, observe)


def train(args):
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")

    envs, eval_envs = make_envs(args)
    n, obs_dim, act_dim = envs.num_envs, envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    agent = Agent(obs_dim, act_dim, args).to(device)
    window, steps = agent.window_size, aib_envs.get_task(args.env_id).steps
    history = aib_envs.History(n, window, steps, obs_dim, act_dim)
    buffer = ReplayBuffer(history, args.buffer_size, device)
    run = make_run(args)

    bar = tqdm(total=args.total_timesteps, desc=run.name.rpartition("__")[0], unit="update", mininterval=5)
    global_step, env_steps, episode, losses = 0, 0, 0, {}
    seconds, clock = dict.fromkeys(("act", "env", "sample", "update", "eval"), 0.0), time.perf_counter()

    def lap(part):
        nonlocal clock
        clock, since = time.perf_counter(), clock
        seconds[part] += clock - since

    def evaluate(rollouts):
        """The benchmark's protocol; writes and shows one line of metrics. AER: average episodic return of a set."""
        returns = aib_envs.evaluate(eval_envs, lambda *x: agent.act(*x, training=False), window, rollouts)
        lap("eval")
        metrics = {
            "global_step": global_step,
            "env_steps": env_steps,
            "aer": {split: r.mean() for split, r in returns.items()},
            "returns": {split: r.mean(1).tolist() for split, r in returns.items()},
            "losses": {name: loss.item() for name, loss in losses.items()},
            "alpha": agent.log_alpha.exp().item(),
            "seconds": {part: round(value, 2) for part, value in seconds.items()},
        }
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        aer = ", ".join(f"{split} {value:.1f}" for split, value in metrics["aer"].items())
        bar.write(f"step {global_step}: AER {aer}")
        bar.set_postfix_str(aer)
        return returns

    while global_step < args.total_timesteps:
        # An episode in all training contexts in lockstep; before it a warm-up (t < 0, own reset) that fills the window.
        history.begin()
        for t in range(-window, steps):
            if t in (-window, 0):
                obs, _ = envs.reset(seed=aib_envs.reset_seeds(n, 0, args.seed, episode, int(t < 0)))
            actions = 2 * torch.rand(n, act_dim).numpy() - 1
            learning = episode * steps + max(t, 0) >= args.learning_starts
            if learning:
                actions = agent.act(obs, history, training=True)
            lap("act")
            next_obs, rewards, _, _, infos = envs.step(actions)
            history.add(obs, actions, rewards, next_obs, infos["diverged"])
            obs, env_steps = next_obs, env_steps + n
            lap("env")
            if t < 0 or not learning:
                continue

            if global_step % args.eval_every == 0:
                evaluate(rollouts=1)
            batch = buffer.sample(args.batch_size)
            lap("sample")
            losses |= agent.update(*batch, global_step)
            lap("update")
            global_step += 1
            bar.update()
            if global_step == args.total_timesteps:
                break
        buffer.add(history)
        episode += 1

    returns = {split: r.tolist() for split, r in evaluate(args.eval_rollouts).items()}  # [20, rollouts]
    bar.close()
    torch.save(agent.state_dict(), run / "agent.pt")
    contexts = {split: aib_envs.context_set(args.env_id, split) for split in aib_envs.SPLITS}
    results = {"method": method_name(args), "args": vars(args), "contexts": contexts, "returns": returns}
    write_json(run / "results.json", results)
    print(f"results: {run / 'results.json'}")


if __name__ == "__main__":
    try:
        train(parse_args())
    except OSError as error:  # the run's directory cannot be written
        fail(error)
