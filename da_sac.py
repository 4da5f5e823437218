"""DA: soft actor-critic with Decision Adapters (Beukman et al. 2023), a baseline of arXiv 2602.06550, in one file.

The agent meets a world whose dynamics (context) change from episode to episode, and is told how. The policy and each
Q-function have a hypernetwork of their own, which turns the true context into the weights of their adapter and learns
end to end from their RL loss. The context enters nowhere else. Start it with: python da_sac.py --env-id DI
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
from typing import NamedTuple

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
    total_timesteps: int | None = None  # vector steps (one in every context) = gradient steps; default: the task's own
    cuda: bool = True  # use a GPU if there is one
    run_dir: str = "runs"  # where the run's own directory is made
    eval_every: int = 5_000  # steps between evaluations with 1 rollout per context
    eval_rollouts: int = 10  # rollouts per context of the last evaluation
    resume: str | None = None  # directory of a run to go on with; more --total-timesteps extend a finished one
    keep_checkpoint: bool = False  # keep the checkpoint of a finished run, so that it can be extended
    eval_only: str | None = None  # directory of a finished run, whose last evaluation is repeated
    context: tuple[str, ...] = ()  # with --eval-only: the one context to roll out in, as in length=1.3 inversion=-1
    capture_video: bool = False  # at the end, record an episode as video.gif: in --context, or in both modes
    track: bool = False  # send metrics and video to Weights & Biases
    learning_starts: int = 5_000  # vector steps with random actions that come before the first gradient step
    buffer_size: int = 100_000  # transitions per context in the replay buffer
    batch_size: int = 256  # transitions per gradient step
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # smoothing coefficient of the target networks
    policy_lr: float = 3e-4  # learning rate of the policy
    q_lr: float = 1e-3  # learning rate of the Q-functions and the temperature
    scale_context: bool = False  # scale the context by its outer range, binaries to -1 and 1


POLICY_FREQUENCY = 2  # the policy is updated every second gradient step, twice
WIDTH = 256  # size of the networks' layers


def method_name(args):
    return "DA" + "-scaled" * args.scale_context


# --------------------------------- Hypernetwork and the adapter that it generates -------------------------------
# Eq. 3: the adapter turns the trunk's features x [256] into ReLU(x + W_up ReLU(W_down x + b_down) + b_up), with W_down
# [32, 256] and W_up [256, 32]: 16,672 numbers, generated in 33 chunks of 512 (the last has 224 to spare). Chunk j has a
# learned embedding e_j and features f_j = MLP([z; e_j]) [64]; one linear head for all chunks makes M f_j + m of them:
#     chunks 0 ... 15: every 16th row of W_down (2 each); 16 ... 31: every 16th row of W_up (16 each); 32: the biases.
# The matrices are never built. (M f_j + m) x is linear in [M m] and in [f_j; 1], so x meets the head first, in one
# product for the whole batch, and what comes out meets each sample's own f_j. The same function, several times faster.


class Omega(NamedTuple):
    """Adapter weights: the chunk features and biases of each sample, and the head, the same for the whole batch."""

    down: torch.Tensor  # [batch, 16, 65], [f_j; 1] of the chunks of W_down
    up: torch.Tensor  # [batch, 16, 65], [f_j; 1] of the chunks of W_up
    b_down: torch.Tensor  # [batch, 32]
    b_up: torch.Tensor  # [batch, 256]
    head_down: torch.Tensor  # [256, 2 * 65], [M m] laid out for W_down, which has 256 inputs
    head_up: torch.Tensor  # [32, 16 * 65], [M m] laid out for W_up, which has 32


class Hypernetwork(nn.Module):
    """What is known about the context [batch, inputs] -> omega."""

    def __init__(self, inputs):
        super().__init__()
        self.embeddings = nn.Parameter(torch.randn(33, 8))
        self.first, self.second, self.head = nn.Linear(inputs + 8, 64), nn.Linear(64, 64), nn.Linear(64, 512)

    def forward(self, z):
        w_z, w_e = self.first.weight.tensor_split([-8], dim=1)  # first([z; e_j]); z's part once for all j
        of_z, of_e = F.linear(z, w_z, self.first.bias)[:, None], F.linear(self.embeddings, w_e)
        down, up, last = (F.relu(self.second(F.relu(of_z + part))) for part in of_e.split([16, 16, 1]))
        down, up = F.pad(down, (0, 1), value=1.0), F.pad(up, (0, 1), value=1.0)
        b_down, b_up, _ = self.head(last[:, 0]).split([32, 256, 224], dim=1)
        head = torch.cat([self.head.weight, self.head.bias[:, None]], dim=1)  # [512, 65]
        head_down, head_up = (head.view(-1, columns, 65).transpose(0, 1).flatten(1) for columns in (256, 32))
        return Omega(down, up, b_down, b_up, head_down, head_up)


def generated_linear(x, features, head):
    """Each sample's own generated matrix times its x [batch, in] -> [batch, out], all chunks' first rows first."""
    through_head = (x @ head).unflatten(1, (-1, 65))  # [batch, rows of a chunk, 65]
    return (through_head @ features.mT).flatten(1)


def adapt(x, omega):
    """The generated adapter (Eq. 3) on a trunk's features x [batch, 256]."""
    hidden = F.relu(generated_linear(x, omega.down, omega.head_down) + omega.b_down)
    return F.relu(x + generated_linear(hidden, omega.up, omega.head_up) + omega.b_up)


# ------------------------------------ Networks: policy (xi) and Q-functions (zeta) ------------------------------------


class MLP(nn.Module):
    """Trunk, adapter from an own hypernetwork, head. The trunk ends without an activation, the adapter with a ReLU."""

    def __init__(self, inputs, outputs, context_dim):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, outputs)
        self.hypernetwork = Hypernetwork(context_dim)

    def forward(self, x, context):  # [batch, inputs] -> [batch, outputs]
        contexts, which = context  # [n, dims]; and 1 for the one that a sample has, else 0 [batch, n]
        omega = self.hypernetwork(contexts)  # once for each context, then handed out
        own = [(which @ part.flatten(1)).view(len(x), *part.shape[1:]) for part in omega[:4]]
        return self.head(adapt(self.trunk(x), Omega(*own, *omega[4:])))


class Actor(MLP):
    """Gaussian policy, squashed into (-1, 1) by tanh. The head gives mean and log standard deviation."""

    def forward(self, obs, context):
        mean, log_std = super().forward(obs, context).chunk(2, dim=1)
        return mean, -5 + 3.5 * (torch.tanh(log_std) + 1)  # log standard deviation in [-5, 2]

    def get_action(self, obs, context):
        """A sampled action [batch, act_dim] and its log-probability [batch]."""
        mean, log_std = self(obs, context)
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
    """Soft actor-critic on observations that end with the true context, which goes through the hypernetworks only."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.args, self.target_entropy = args, -act_dim
        self.window_size = 0  # no window, so no warm-up
        self.dims = len(aib_envs.get_task(args.env_id).dimensions)  # of the context, which ends every observation
        obs_dim -= self.dims
        contexts = aib_envs.context_set(args.env_id, "train")
        vectors = [aib_envs.context_vector(args.env_id, context, args.scale_context) for context in contexts]
        self.register_buffer("contexts", torch.tensor(np.stack(vectors)), persistent=False)
        self.actor = Actor(obs_dim, 2 * act_dim, self.dims)
        self.qf1, self.qf2 = MLP(obs_dim + act_dim, 1, self.dims), MLP(obs_dim + act_dim, 1, self.dims)
        self.qf1_target, self.qf2_target = copy.deepcopy(self.qf1), copy.deepcopy(self.qf2)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        adam = functools.partial(torch.optim.Adam, fused=True, capturable=True)  # for CUDA graphs, too
        self.q_optimizer = adam([*self.qf1.parameters(), *self.qf2.parameters()], lr=args.q_lr)
        self.actor_optimizer = adam(self.actor.parameters(), lr=args.policy_lr)
        self.alpha_optimizer = adam([self.log_alpha], lr=args.q_lr)

    @torch.inference_mode()
    def act(self, obs, history, training=False):
        """obs [n, obs_dim] -> actions [n, act_dim]: sampled in training, deterministic in evaluation (all NumPy)."""
        to = lambda x: torch.from_numpy(x).to(self.log_alpha.device)
        obs, contexts = to(obs).tensor_split([-self.dims], dim=1)
        context = contexts, torch.eye(len(obs), device=obs.device)
        actions = self.actor.get_action(obs, context)[0] if training else self.actor(obs, context)[0].tanh()
        return actions.cpu().numpy()

    def update(self, obs, actions, next_obs, rewards, policy_turn):
        """One gradient step on a sampled batch. Returns the losses."""
        (obs, context), (next_obs, _) = (x.tensor_split([-self.dims], dim=1) for x in (obs, next_obs))
        obs_actions, losses = torch.cat([obs, actions], 1), {}
        which = (context[:, None] == self.contexts).all(2).float()  # one-hot [batch, 20]
        context = self.contexts, which / which.sum(1, keepdim=True)  # NaN for a context that is none of them

        # Critics. Episodes end by time limit only, so the target always bootstraps.
        with torch.no_grad():
            next_actions, next_log_pi = self.actor.get_action(next_obs, context)
            next_obs_actions = torch.cat([next_obs, next_actions], 1)
            qf_next = torch.min(self.qf1_target(next_obs_actions, context), self.qf2_target(next_obs_actions, context))
            next_q_value = rewards + self.args.gamma * (qf_next.squeeze(1) - self.log_alpha.exp() * next_log_pi)
        qf1, qf2 = self.qf1(obs_actions, context).squeeze(1), self.qf2(obs_actions, context).squeeze(1)
        losses["qf"] = F.mse_loss(qf1, next_q_value) + F.mse_loss(qf2, next_q_value)
        self.q_optimizer.zero_grad()
        losses["qf"].backward()
        self.q_optimizer.step()

        # Policy and temperature
        for _ in range(POLICY_FREQUENCY if policy_turn else 0):
            pi, log_pi = self.actor.get_action(obs, context)
            obs_pi = torch.cat([obs, pi], 1)
            min_qf_pi = torch.min(self.qf1(obs_pi, context), self.qf2(obs_pi, context)).squeeze(1)
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

    def diagnose(self, *batch):
        return {}  # there is no z


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
    options["observe_context"] = "scaled" if args.scale_context else "raw"
    return aib_envs.make_vec(args.env_id, contexts, **options)


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
    envs = make_envs(args, aib_envs.context_set(args.env_id, "train"))
    eval_envs = make_envs(args, aib_envs.eval_contexts(args.env_id))
    agent, n = make_agent(args, envs), envs.num_envs
    obs_dim, act_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    device = agent.log_alpha.device
    update = aib_tools.CudaGraph(agent.update) if device.type == "cuda" else agent.update
    window, steps = agent.window_size, aib_envs.get_task(args.env_id).steps
    history = aib_envs.History(n, window, steps, obs_dim, act_dim)
    buffer = ReplayBuffer(history, args.buffer_size, device)

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
    bar = tqdm(initial=global_step, total=args.total_timesteps, unit="update", mininterval=5)
    bar.set_description(run.name.rpartition("__")[0])

    def lap(part):
        nonlocal clock
        clock, since = time.perf_counter(), clock
        seconds[part] += clock - since

    def evaluate(rollouts):
        """The benchmark's protocol; writes and shows one line of metrics. AER: average episodic return of a set."""
        aib_tools.check_finite("weight", agent.state_dict(), global_step)
        returns = aib_envs.by_split(aib_envs.evaluate(eval_envs, agent.act, window, rollouts))
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
        with torch.random.fork_rng():  # the run's own generators shall not notice
            metrics |= agent.diagnose(*buffer.sample(args.batch_size))
        metrics_file.write(json.dumps(metrics) + "\n")
        metrics_file.flush()
        aer = ", ".join(f"{split} {value:.1f}" for split, value in metrics["aer"].items())
        bar.write(f"step {global_step}: AER {aer}")
        bar.set_postfix_str(aer)
        lap("eval")
        return returns

    while global_step < args.total_timesteps:
        # An episode in all training contexts in lockstep; before it a warm-up (t < 0, own reset) that fills the window.
        history.begin()
        for t in range(-window, steps):
            if t in (-window, 0):
                obs, _ = envs.reset(seed=aib_envs.reset_seeds(n, 0, args.seed, episode, int(t < 0)))
            learning = episode * steps + max(t, 0) >= args.learning_starts
            uniform = 2 * torch.rand(n, act_dim).numpy() - 1
            actions = agent.act(obs, history, training=True) if learning else uniform
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
            losses |= update(*batch, global_step % POLICY_FREQUENCY == 0)
            if device.type == "cpu" or global_step % 100 == 0:  # a check waits for a GPU
                aib_tools.check_finite("loss", losses, global_step)
            lap("update")
            global_step += 1
            bar.update()
            if global_step == args.total_timesteps:
                break
        if t < steps - 1:
            break  # the end came in the middle of an episode, where there is no checkpoint
        buffer.add(history)
        episode += 1
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
