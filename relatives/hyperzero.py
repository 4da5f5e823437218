"""HyperZero: zero-shot transfer by supervised learning on solved tasks (arXiv 2211.15457), in one file.

Stage 1 trains an expert by TD3 in each training context and records rollouts of the final policies. In stage 2 a
hypernetwork learns to turn a context, which it is told, into the expert's whole policy and Q-function; for new contexts
it generates them without another step of learning. With --model mlp, networks that get the context as an input learn
from the same data (UVFA). Start it with: python relatives/hyperzero.py --env-id DI
"""

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import aib_envs
import aib_run

# ----------------------------------------------------- Arguments ------------------------------------------------------


@dataclass
class Args(aib_run.Args):  # --env-id, --seed, --run-dir, --resume, ... stand in aib_run.py
    free = aib_run.FREE - {"total_timesteps"} | {"eval_epochs"}  # stage 2 begins where stage 1 ends: never extended

    total_timesteps: aib_run.Count | None = None  # stage 1: vector steps (one of every expert); default: the task's own
    eval_every: aib_run.Count = 5_000  # stage 1: steps between evaluations of the experts with 1 rollout
    keep_checkpoint: bool = False  # keep the checkpoint of a finished run (which cannot be extended)
    learning_starts: aib_run.EpisodeOrMore = 5_000  # stage 1: random vector steps before the first gradient step
    buffer_size: aib_run.EpisodeOrMore = 100_000  # stage 1: transitions per expert in the replay buffer
    batch_size: aib_run.Count = 256  # stage 1: transitions of each expert per gradient step
    gamma: aib_run.Fraction = 0.99  # discount factor
    tau: aib_run.Fraction = 0.01  # stage 1: smoothing coefficient of the target networks
    expert_lr: aib_run.Fraction = 1e-4  # stage 1: learning rate of policies and Q-functions
    noise_steps: aib_run.Count = 100_000  # stage 1: steps in which the noise falls from 1.0 to 0.1
    rollouts: aib_run.Count = 10  # stage 1: rollouts of every final expert in the data set
    dataset: str = ""  # directory of a run whose data set is taken, with its stage 1's flags; only stage 2 is done then
    held_out: aib_run.Fraction = 0.0  # stage 2: part of the training contexts that it does not see, at most all but one
    model: Literal["hyper", "mlp"] = "hyper"  # stage 2: generate networks from the context, or give it them as an input
    q: bool = True  # stage 2: learn the Q-function, too?
    td: bool = True  # stage 2: the TD term for the Q-function's target, too?
    epochs: aib_run.Count = 500  # stage 2: in each, as many tuples are drawn as the data set has
    eval_epochs: aib_run.Count = 50  # stage 2: epochs between evaluations with 1 rollout per context
    hyper_batch_size: aib_run.Count = 512  # stage 2: tuples per gradient step, rounded up to as many of every context
    hyper_lr: aib_run.Fraction = 1e-4  # stage 2: learning rate


WIDTH = 256  # size of the networks' layers
UPDATE_EVERY = 2  # experts learn every second vector step,
POLICY_DELAY = 2  # and their policies every second time
LOSS_WEIGHTS = {"action": 1.0, "value": 0.01, "td": 0.01}  # of stage 2 (Eqs. 4, 5)


def method_name(args):
    """The method's name with these flags, as in tools/methods.py."""
    if args.td and not args.q:
        aib_run.fail("--no-q needs --no-td, for that term is about Q")
    if args.model == "mlp" and not args.q:
        return "MLP"
    name = "UVFA" if args.model == "mlp" else "HyperZero"
    if not args.q:
        return name + "-noQ"
    if not args.td:
        return name + "-noTD"
    return name


# ---------------------------------------------- Stage 1: stacked experts ----------------------------------------------
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
    """Three layers; `linear` is the class that they are of."""
    return nn.Sequential(linear(inputs, WIDTH), nn.ReLU(), linear(WIDTH, WIDTH), nn.ReLU(), linear(WIDTH, outputs))


def adam(parameters, lr):
    return torch.optim.Adam(parameters, lr=lr, fused=True, capturable=True)  # capturable: for --cuda-graph


class Experts(nn.Module):
    """n agents that learn by TD3 (Fujimoto et al. 2018), each in its own context."""

    def __init__(self, n, obs_dim, act_dim, args):
        super().__init__()
        self.args = args
        linear = functools.partial(StackedLinear, n)
        self.actor = mlp(linear, obs_dim, act_dim)
        self.qf1 = mlp(linear, obs_dim + act_dim, 1)
        self.qf2 = mlp(linear, obs_dim + act_dim, 1)
        self.actor_target = copy.deepcopy(self.actor)
        self.qf1_target = copy.deepcopy(self.qf1)
        self.qf2_target = copy.deepcopy(self.qf2)
        self.q_optimizer = adam([*self.qf1.parameters(), *self.qf2.parameters()], args.expert_lr)
        self.actor_optimizer = adam(self.actor.parameters(), args.expert_lr)

    @torch.inference_mode()
    def act(self, obs, history=None, std=0.0):
        """obs [n, obs_dim] -> each agent's action [n, act_dim] (NumPy), with noise of standard deviation `std`."""
        obs = torch.from_numpy(obs).to(self.actor[0].bias.device)
        actions = self.actor(obs[:, None])[:, 0].tanh()
        if std > 0:
            actions = (actions + std * torch.randn_like(actions)).clamp(-1, 1)
        return actions.cpu().numpy()

    def update(self, obs, actions, next_obs, rewards, noise, update_policy):
        """One gradient step on each agent's own batch [n, batch, ...]; the target policies' actions get `noise`
        [n, batch, act_dim]. Returns the losses, means over agents."""
        losses = {}
        obs_actions = torch.cat([obs, actions], 2)

        # Critics. Episodes end by time limit only, so the target always bootstraps.
        with torch.no_grad():
            next_actions = (self.actor_target(next_obs).tanh() + noise).clamp(-1, 1)
            next_obs_actions = torch.cat([next_obs, next_actions], 2)
            qf1_next = self.qf1_target(next_obs_actions)
            qf2_next = self.qf2_target(next_obs_actions)
            next_q_value = rewards + self.args.gamma * torch.min(qf1_next, qf2_next).squeeze(2)
        qf1 = self.qf1(obs_actions).squeeze(2)
        qf2 = self.qf2(obs_actions).squeeze(2)
        qf_losses = ((qf1 - next_q_value) ** 2 + (qf2 - next_q_value) ** 2).mean(1)  # [n]
        self.q_optimizer.zero_grad()
        qf_losses.sum().backward()
        self.q_optimizer.step()
        losses["qf_loss"] = qf_losses.mean()

        if update_policy:
            pi = self.actor(obs).tanh()
            actor_losses = -self.qf1(torch.cat([obs, pi], 2)).mean((1, 2))  # [n]
            self.actor_optimizer.zero_grad()
            actor_losses.sum().backward(inputs=list(self.actor.parameters()))  # none for the Q-functions
            self.actor_optimizer.step()
            losses["actor_loss"] = actor_losses.mean()
            self.update_targets()
        return {name: loss.detach() for name, loss in losses.items()}

    @torch.no_grad()
    def update_targets(self):
        """Moves the target networks a little towards the others."""
        pairs = [(self.actor, self.actor_target), (self.qf1, self.qf1_target), (self.qf2, self.qf2_target)]
        for network, target in pairs:
            for source, slow in zip(network.parameters(), target.parameters(), strict=True):
                slow.lerp_(source, self.args.tau)


# ------------------------------------------ Replay buffer and experts' data set ---------------------------------------


class StackedReplay:
    """Finished episodes of each expert, laid out as in aib_envs.History: T steps each."""

    def __init__(self, history, buffer_size, device):
        n, steps = history.rewards.shape
        self.num_episodes = buffer_size // steps  # of each expert
        self.num_added = 0
        shape = (n, self.num_episodes)
        self.obs = torch.zeros(*shape, *history.obs.shape[1:], device=device)
        self.next_obs = torch.zeros_like(self.obs)
        self.actions = torch.zeros(*shape, *history.actions.shape[1:], device=device)
        self.rewards = torch.zeros(*shape, steps, device=device)
        self.lengths = torch.zeros(*shape, dtype=torch.long, device=device)  # until the simulation diverged, if it did

    def add(self, history):
        """Stores a finished episode, in the place of the oldest."""
        i = self.num_added % self.num_episodes
        self.obs[:, i] = torch.from_numpy(history.obs)
        self.next_obs[:, i] = torch.from_numpy(history.next_obs)
        self.actions[:, i] = torch.from_numpy(history.actions)
        self.rewards[:, i] = torch.from_numpy(history.rewards)
        self.lengths[:, i] = torch.from_numpy(history.lengths)
        self.num_added += 1

    def draw(self, batch_size):
        """Steps drawn uniformly from each expert's own, as places (expert [n, 1], episode [n, batch], t [n, batch])."""
        n = len(self.obs)
        ends = self.lengths.cumsum(1)  # where each episode ends in the list of all steps of an expert
        i = (torch.rand(n, batch_size, device=self.obs.device) * ends[:, -1:]).long()
        episode = torch.searchsorted(ends, i, right=True)  # the one that step i lies in
        episode = episode.clamp(max=self.num_episodes - 1)  # of an expert without any step
        t = i - ends.gather(1, episode) + self.lengths.gather(1, episode)
        expert = torch.arange(n, device=self.obs.device)[:, None]
        return expert, episode, t

    def sample(self, batch_size):
        """Each expert's obs, actions, next_obs, rewards, all [n, batch, ...]."""
        at = self.draw(batch_size)
        return self.obs[at], self.actions[at], self.next_obs[at], self.rewards[at]


class DataSet(StackedReplay):
    """What each final expert does, and what it thinks of that: q [n, rollouts, T] is the smaller of the values that its
    two Q-functions give. env_steps: what the experts and these rollouts have cost."""

    def __init__(self, history, rollouts, device):
        steps = history.rewards.shape[1]
        super().__init__(history, rollouts * steps, device)
        self.q = torch.zeros_like(self.rewards)
        self.env_steps = 0

    def record(self, envs, experts, history, seed):
        """Fills it with rollouts of the experts without noise."""
        n, steps = history.rewards.shape
        for rollout in range(self.num_episodes):
            history.begin()
            obs, _ = envs.reset(seed=aib_envs.reset_seeds(n, 2, seed, rollout))
            for _ in range(steps):
                actions = experts.act(obs)
                next_obs, rewards, _, _, infos = envs.step(actions)
                history.add(obs, actions, rewards, next_obs, infos["diverged"])
                obs = next_obs
            self.add(history)
            with torch.no_grad():
                obs_actions = torch.cat([self.obs[:, rollout], self.actions[:, rollout]], 2)
                q = torch.min(experts.qf1(obs_actions), experts.qf2(obs_actions))
            self.q[:, rollout] = q.squeeze(2)

    def sample(self, batch_size):
        """Each expert's obs, actions, next_obs, rewards, q, all [n, batch, ...]."""
        at = self.draw(batch_size)
        return self.obs[at], self.actions[at], self.next_obs[at], self.rewards[at], self.q[at]

    def expert_returns(self):
        """Mean return of each expert."""
        return self.rewards.double().sum(2).mean(1).tolist()


# The flags that a data set depends on
STAGE_1 = ["total_timesteps", "learning_starts", "buffer_size", "batch_size", "gamma", "tau", "expert_lr"]
STAGE_1 += ["noise_steps", "rollouts"]


def write_dataset(path, args, dataset):
    flags = {name: getattr(args, name) for name in STAGE_1}
    aib_run.write(path, {"env_id": args.env_id, "args": flags, "dataset": vars(dataset)})


def read_dataset(args, history, device):
    """The data set of the run --dataset, whose stage 1's flags go into `args`; ends the program with one line if it
    cannot be used."""
    defaults = vars(Args()) | {"total_timesteps": aib_envs.get_task(args.env_id).total_timesteps}
    with aib_run.reading(Path(args.dataset).expanduser() / "dataset.pt") as path:
        found = aib_run.read_tensors(path)
        if found["env_id"] != args.env_id:
            raise ValueError(f"it is of {found['env_id']}, which should be {args.env_id}")
        for name, value in found["args"].items():
            if getattr(args, name) not in (value, defaults[name]):
                raise ValueError(f"its experts had {aib_run.flag(name)} {value}")
            setattr(args, name, value)
        dataset = DataSet(history, args.rollouts, device)
        if found["dataset"].keys() != vars(dataset).keys():
            raise ValueError("it is of another version of this script")
        for name, value in found["dataset"].items():
            setattr(dataset, name, value.to(device) if torch.is_tensor(value) else value)
        return dataset


# ------------------------------------- Stage 2: context -> policy and Q-function --------------------------------------


class Residual(nn.Sequential):
    """x + Linear(ReLU(Linear(ReLU(x))))."""

    def __init__(self, width):
        super().__init__(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x):
        return x + super().forward(x)


def embedding(inputs, outputs):
    """A part of the task embedding."""
    return nn.Sequential(nn.Linear(inputs, outputs), Residual(outputs), Residual(outputs))


class Heads(nn.Module):
    """Task embeddings [n, 256] -> n networks: w1 [n, inputs, 256], b1 [n, 1, 256], w2 [n, 256, outputs],
    b2 [n, 1, outputs]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.first = nn.Linear(256, (inputs + 1) * WIDTH)
        self.last = nn.Linear(256, (WIDTH + 1) * outputs)
        for head, bound in ((self.first, 0.05), (self.last, 0.008)):
            nn.init.uniform_(head.weight, -bound, bound)
            nn.init.zeros_(head.bias)

    def forward(self, x):
        first = self.first(x).unflatten(1, (-1, WIDTH))  # [n, inputs + 1, 256], the last row is the bias
        last = self.last(x).unflatten(1, (WIDTH + 1, -1))  # [n, 257, outputs]
        return first[:, :-1], first[:, -1:], last[:, :-1], last[:, -1:]


def apply_generated(w1, b1, w2, b2, x):
    """n generated networks, each on its own inputs: [n, batch, inputs] -> [n, batch, outputs]."""
    hidden = F.relu(torch.baddbmm(b1, x, w1))
    return torch.baddbmm(b2, hidden, w2)


class TaskHypernetwork(nn.Module):
    """Contexts [n, dimensions] -> for each (inputs, outputs) of `sizes` a function, which is n generated networks:
    [n, batch, inputs] -> [n, batch, outputs]."""

    def __init__(self, dimensions, sizes):
        super().__init__()
        self.embed = nn.Sequential(embedding(dimensions, 64), embedding(64, 128), embedding(128, 256))
        self.heads = nn.ModuleList(Heads(*size) for size in sizes)

    def forward(self, context):
        x = self.embed(context)
        return [functools.partial(apply_generated, *heads(x)) for heads in self.heads]


class ContextMLP(nn.Module):
    """The same, but of MLPs with the context as an input. Policy (0 in place of a) and Q-function share one layer."""

    def __init__(self, dimensions, sizes):
        super().__init__()
        self.inputs, _ = sizes[-1]
        self.first = nn.Linear(self.inputs + dimensions, WIDTH)
        self.rest = nn.ModuleList(mlp(nn.Linear, WIDTH, outputs)[1:] for _, outputs in sizes)  # all but the first

    def forward(self, context):
        return [functools.partial(self.with_context, rest, context) for rest in self.rest]

    def with_context(self, rest, context, x):
        x = F.pad(x, (0, self.inputs - x.shape[2]))
        context = context[:, None].expand(-1, x.shape[1], -1)
        return rest(self.first(torch.cat([x, context], 2)))


class Agent(nn.Module):
    """What stage 2 trains. The observations that it acts on end with the scaled context."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.args = args
        self.window_size = 0  # no window, so no warm-up
        task = aib_envs.get_task(args.env_id)
        self.context_dim = len(task.dimensions)
        sizes = [(task.obs_dim, act_dim)]
        if args.q:
            sizes.append((task.obs_dim + act_dim, 1))
        model = {"hyper": TaskHypernetwork, "mlp": ContextMLP}[args.model]
        self.model = model(self.context_dim, sizes)
        self.optimizer = adam(self.parameters(), args.hyper_lr)
        self.context = torch.zeros(0)  # in which it has acted last,
        self.policy = None  # and its policy there

    @torch.inference_mode()
    def act(self, obs, history, training=False):
        """obs [n, obs_dim] -> deterministic actions [n, act_dim] (all NumPy)."""
        obs = torch.from_numpy(obs).to(next(self.parameters()).device)
        obs, context = obs.tensor_split([-self.context_dim], dim=1)
        if history.t == 0 or not torch.equal(context, self.context):  # it may be flipped within an episode
            self.context = context.clone()
            self.policy, *_ = self.model(context)
        return self.policy(obs[:, None])[:, 0].tanh().cpu().numpy()

    def losses(self, context, obs, actions, next_obs, rewards, q):
        """The terms of Eqs. 4 and 5 for contexts [n, dimensions] and tuples [n, batch, ...] of each."""
        policy, *qf = self.model(context)
        losses = {"action": F.mse_loss(policy(obs).tanh(), actions)}
        if self.args.q:
            values = qf[0](torch.cat([obs, actions], 2)).squeeze(2)
            losses["value"] = F.mse_loss(values, q)
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


# ------------------------------------------------------ Training ------------------------------------------------------


def make_envs(args, contexts, **options):
    return aib_envs.make_vec(args.env_id, contexts, observe_context="scaled", **options)


def make_agent(args, envs):
    obs_dim = envs.single_observation_space.shape[0]
    act_dim = envs.single_action_space.shape[0]
    return Agent(obs_dim, act_dim, args).to(aib_run.device(args))


def train_experts(args, run, experts, replay, history):
    """Stage 1: n experts, each in its own training context."""
    contexts = aib_envs.context_set(args.env_id, "train")
    envs = aib_envs.make_vec(args.env_id, contexts)
    eval_envs = aib_envs.make_vec(args.env_id, contexts)
    n, steps = history.rewards.shape
    act_dim = envs.single_action_space.shape[0]

    while run.global_step < args.total_timesteps:
        history.begin()  # an episode in all training contexts at once
        obs, _ = envs.reset(seed=aib_envs.reset_seeds(n, 0, args.seed, run.episode, 0))
        for t in range(steps):
            learning = run.episode * steps + t >= args.learning_starts
            std = max(1 - 0.9 * run.global_step / args.noise_steps, 0.1)  # of the explorers' and the targets' noise
            actions = experts.act(obs, std=std) if learning else 2 * torch.rand(n, act_dim).numpy() - 1
            next_obs, rewards, _, _, infos = envs.step(actions)
            history.add(obs, actions, rewards, next_obs, infos["diverged"])
            obs = next_obs
            run.add_env_steps(n)
            if not learning:
                continue

            if run.global_step % args.eval_every == 0:
                returns, _ = aib_envs.evaluate(eval_envs, experts.act, window_size=0, rollouts=1)
                run.log({"experts": returns[:, 0].tolist()}, f"experts' mean return {returns.mean():.1f}")
            losses = {}
            if run.global_step % UPDATE_EVERY == 0:
                batch = replay.sample(args.batch_size)
                noise = (std * torch.randn(n, args.batch_size, act_dim, device=replay.obs.device)).clamp(-0.3, 0.3)
                update_policy = run.global_step % (UPDATE_EVERY * POLICY_DELAY) == 0
                losses = experts.update(*batch, noise, update_policy)
            run.advance(losses)
            if run.global_step == args.total_timesteps:
                break
        if t == steps - 1:  # not so if total_timesteps came first
            replay.add(history)
            run.end_episode(history)


def split_contexts(n, fraction, seed):
    """Which of n contexts are held out, at most all but one, and which are seen (sorted lists of their places)."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    num_held_out = min(round(fraction * n), n - 1)
    return sorted(order[:num_held_out]), sorted(order[num_held_out:])


def train_agent(args, run, agent, dataset):
    """Stage 2: one agent, which imitates all experts but those of the contexts that are held out."""
    contexts = aib_envs.context_set(args.env_id, "train")
    eval_envs = make_envs(args, aib_envs.eval_contexts(args.env_id))
    held_out, seen = split_contexts(len(contexts), args.held_out, args.seed)
    vectors = [aib_envs.context_vector(args.env_id, contexts[i], scaled=True).tolist() for i in seen]
    vectors = torch.tensor(vectors, device=dataset.obs.device)  # [seen, dimensions]
    batch_size = -(-args.hyper_batch_size // len(seen))  # of each context, whose networks are generated once
    num_updates = -(-dataset.rewards[0].numel() // batch_size)  # of an epoch
    experts = dataset.expert_returns()

    for epoch in range(run.global_step - args.total_timesteps, args.epochs):
        if epoch % args.eval_epochs == 0:
            evaluation = aib_envs.evaluate(eval_envs, agent.act, agent.window_size, rollouts=1)
            run.log_evaluation(*evaluation, {"epoch": epoch, "experts": experts})
        for _ in range(num_updates):
            batch = dataset.sample(batch_size)
            losses = agent.update(vectors, *(part[seen] for part in batch))
        run.advance(losses)  # its step is an epoch now
        run.safe_point(run.global_step == run.total_steps or (epoch + 1) % args.eval_epochs == 0)

    evaluation = aib_envs.evaluate(eval_envs, agent.act, agent.window_size, args.eval_rollouts)
    run.finish(*evaluation, {"epoch": args.epochs, "experts": experts}, experts=experts, held_out=held_out)


def train(args):
    torch.manual_seed(args.seed)
    method = method_name(args)
    task = aib_envs.get_task(args.env_id)
    device = aib_run.device(args)
    contexts = aib_envs.context_set(args.env_id, "train")
    n = len(contexts)
    agent = make_agent(args, make_envs(args, [{}]))
    experts = Experts(n, task.obs_dim, task.act_dim, args).to(device)
    history = aib_envs.History(n, 0, task.steps, task.obs_dim, task.act_dim)
    if args.dataset and not aib_run.has_checkpoint(args):
        dataset = read_dataset(args, history, device)
    else:
        dataset = DataSet(history, args.rollouts, device)  # to be filled by stage 1, or from the checkpoint
    replay = StackedReplay(history, args.buffer_size, device)
    steps = args.total_timesteps + args.epochs
    run = aib_run.Run(args, method, agent, dataset, stage_1=(experts, replay), total_steps=steps)

    if run.stage == 1:
        if not args.dataset:
            train_experts(args, run, experts, replay, history)
            dataset.record(aib_envs.make_vec(args.env_id, contexts), experts, history, args.seed)
            dataset.env_steps = run.env_steps + args.rollouts * task.steps * n
            write_dataset(run.directory / "dataset.pt", args, dataset)
        torch.manual_seed(args.seed)  # so that --dataset gives the same stage 2
        run.begin_stage_2(args.total_timesteps, dataset.env_steps)
    train_agent(args, run, agent, dataset)
    return run


if __name__ == "__main__":
    aib_run.main(Args, train, make_envs, make_agent)
