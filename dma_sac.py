"""DMA*: soft actor-critic with a dynamics-aligned context encoder (arXiv 2602.06550).

The agent meets a world whose dynamics change from episode to episode, and nobody tells it how.
A recurrent encoder turns the last K transitions into a small vector z, which is appended to the
inputs of the dynamics model, the policy and both Q-functions. The encoder learns from
predicting the dynamics alone: the RL losses see z as a constant. With --mask-prob 0
--no-normalise it is DMA, with --kl-beta 0.4 DMA-Pearl. Start it with

    python dma_sac.py --env-id DI
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import aib_envs
import aib_run

# ------------------------------------- Arguments --------------------------------------


# Fraction: from 0 to 1. Count: 1 or more. EpisodeOrMore: the steps of an episode or more.
@dataclass
class Args(aib_run.Args):  # --env-id, --seed, --total-timesteps, --resume, ... stand in aib_run.py
    learning_starts: aib_run.EpisodeOrMore = 5_000  # random steps that come first; total_timesteps leaves them out
    buffer_size: aib_run.EpisodeOrMore = 100_000  # transitions per context in the replay buffer
    batch_size: aib_run.Count = 256  # transitions per gradient step
    gamma: aib_run.Fraction = 0.99  # discount factor
    tau: aib_run.Fraction = 0.005  # smoothing coefficient of the target networks
    bootstrap_at_limit: bool = True  # bootstrap at an episode's time limit (the authors do not)
    policy_lr: aib_run.Fraction = 3e-4  # learning rate of the policy
    q_lr: aib_run.Fraction = 1e-3  # learning rate of the Q-functions and the temperature
    dynamics_lr: aib_run.Fraction = 3e-4  # learning rate of all that the dynamics loss trains
    mask_prob: aib_run.Fraction = 0.2  # probability of masking the encoder's inputs
    normalise: bool = True  # norms: AvgL1Norm on the embedded transitions, SimNorm on z
    kl_beta: aib_run.Fraction = 0.0  # DMA-Pearl (no masks, no norms): loss x (1 + beta KL)


POLICY_FREQUENCY = 2  # the policy is updated every second gradient step, twice
WIDTH = 256  # size of the trunks' layers
Z_DIM = 8  # size of z


def method_name(args):
    """The method's name with these flags, as in tools/methods.py."""
    name = "DMAstar"
    if args.kl_beta > 0:
        name = "DMA-Pearl"
    elif args.mask_prob == 0 and not args.normalise:
        name = "DMA"
    elif args.mask_prob == 0:
        name += "-nomask"
    elif not args.normalise:
        name += "-nonorm"
    return name


# ------------------------------- Context encoder (phi) --------------------------------


def subsample(batch_size, window_size, training, device=None):
    """Which transitions of the window the encoder sees: positions [batch or 1, K // 5], of
    which 0 is the oldest. In training a random fifth in random order, in evaluation a fifth
    evenly spaced in time."""
    n = window_size // 5
    if training:
        numbers = torch.rand(batch_size, window_size, device=device)
        return numbers.topk(n).indices  # n different positions, at random
    evenly = torch.linspace(0, window_size - 1, n, dtype=torch.float64)  # float32 is too coarse
    return evenly.long()[None]


def avg_l1_norm(x):
    """Divides each vector by the mean of its absolute values."""
    return x / x.abs().mean(-1, keepdim=True).clamp(min=1e-8)


def sim_norm(x):
    """Softmax in groups of four."""
    return x.unflatten(-1, (-1, 4)).softmax(-1).flatten(-2)


class Encoder(nn.Module):
    """Transitions (s, a, s' - s) of the window -> z [batch, 8], with norms in [0, 1]."""

    def __init__(self, obs_dim, act_dim, mask_prob, normalise):
        super().__init__()
        self.embed = nn.Linear(2 * obs_dim + act_dim, 32, bias=False)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.head = nn.Linear(32, Z_DIM, bias=False)
        self.mask_prob = mask_prob
        self.normalise = normalise

    def mask(self, x):
        """Sets each state, action or change to zero, as a whole, with probability `mask_prob`."""
        keep = torch.rand(*x.shape[:2], 1, device=x.device) >= self.mask_prob
        return x * keep

    def forward(self, obs, actions, deltas):  # each [batch, K // 5, dim]
        parts = [obs, actions, deltas]
        if self.training:
            parts = [self.mask(part) for part in parts]
        x = self.embed(torch.cat(parts, dim=-1))
        if self.normalise:
            x = avg_l1_norm(x)
        hidden, _ = self.lstm(x)
        z = self.head(hidden[:, -1])
        if self.normalise:
            z = sim_norm(z)
        return z


class GaussianHead(nn.Module):
    """DMA-Pearl's z: a sample of a Gaussian in training, its mean in evaluation."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(32, Z_DIM), nn.LayerNorm(Z_DIM))
        self.variance = nn.Sequential(nn.Linear(32, Z_DIM), nn.LayerNorm(Z_DIM), nn.Softplus())

    def forward(self, x):
        mean = self.mean(x)
        if not self.training:
            return mean
        variance = self.variance(x)
        self.kl = (mean**2 + variance - variance.log() - 1).mean() / 2  # to N(0, I)
        return mean + variance.sqrt() * torch.randn_like(mean)


# -------- Networks: dynamics model (theta), policy (xi) and Q-functions (zeta) --------


class MLP(nn.Module):
    """Trunk of two layers and head; z is appended to the input."""

    def __init__(self, inputs, outputs):
        super().__init__()
        first = nn.Linear(inputs + Z_DIM, WIDTH)
        self.trunk = nn.Sequential(first, nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, outputs)

    def forward(self, x, z):  # [batch, inputs] -> [batch, outputs]
        features = F.relu(self.trunk(torch.cat([x, z], 1)))
        return self.head(features)


class Actor(MLP):
    """Gaussian policy, squashed into (-1, 1) by tanh. The head gives mean and log standard
    deviation. `condition`: what the network is told about the context."""

    def forward(self, obs, condition):
        mean, log_std = super().forward(obs, condition).chunk(2, dim=1)
        log_std = -5 + 3.5 * (torch.tanh(log_std) + 1)  # in [-5, 2]
        return mean, log_std

    def get_action(self, obs, condition):
        """A sampled action [batch, act_dim] and its log-probability [batch]."""
        mean, log_std = self(obs, condition)
        normal = torch.distributions.Normal(mean, log_std.exp(), validate_args=False)
        x = normal.rsample()
        action = torch.tanh(x)
        log_prob = normal.log_prob(x)
        log_prob = log_prob - torch.log(1 - action.pow(2) + 1e-6)  # tanh changes the density
        return action, log_prob.sum(1)


# ----------------------------------- Replay buffer ------------------------------------


class ReplayBuffer:
    """Finished episodes of all contexts, laid out as in aib_envs.History: K steps of warm-up,
    then the episode's T."""

    def __init__(self, history, buffer_size, device):
        num_envs, steps = history.rewards.shape
        self.num_episodes = buffer_size // steps  # of each context
        self.num_added = 0
        self.window_size = history.window_size
        shape = (num_envs, self.num_episodes)
        # obs: [n, episodes, K + T, obs_dim]
        self.obs = torch.zeros(*shape, *history.obs.shape[1:], device=device)
        self.next_obs = torch.zeros_like(self.obs)
        self.actions = torch.zeros(*shape, *history.actions.shape[1:], device=device)
        self.rewards = torch.zeros(*shape, steps, device=device)  # [n, episodes, T]
        self.lengths = torch.zeros(*shape, dtype=torch.long, device=device)  # steps to draw from

    def add(self, history):
        """Stores a finished episode, in the place of the oldest."""
        i = self.num_added % self.num_episodes
        self.obs[:, i] = torch.from_numpy(history.obs)
        self.next_obs[:, i] = torch.from_numpy(history.next_obs)
        self.actions[:, i] = torch.from_numpy(history.actions)
        self.rewards[:, i] = torch.from_numpy(history.rewards)
        self.lengths[:, i] = torch.from_numpy(history.lengths)  # T, or less after a divergence
        self.num_added += 1

        # All steps are numbered through: where each episode's numbers begin and end
        self.ends = self.lengths.flatten().cumsum(0)
        self.begins = self.ends - self.lengths.flatten()
        self.total = int(self.ends[-1])

    def sample(self, batch_size):
        """Steps drawn uniformly from all finished episodes: obs, actions, next_obs, rewards and
        last, all [batch, ...], and what the encoder sees of the window before each of them:
        (obs, actions, deltas), all [batch, K // 5, dim]."""
        device = self.obs.device
        obs = self.obs.flatten(0, 2)  # [all episodes' K + T steps, obs_dim]
        next_obs = self.next_obs.flatten(0, 2)
        actions = self.actions.flatten(0, 2)

        i = torch.randint(self.total, (batch_size,), device=device)
        episode = torch.searchsorted(self.ends, i, right=True)  # the one that step i lies in
        t = i - self.begins[episode]  # the step's place in that episode
        last = t == self.rewards.shape[2] - 1
        now = episode * self.obs.shape[2] + self.window_size + t  # its place in obs

        positions = subsample(batch_size, self.window_size, training=True, device=device)
        past = now[:, None] - self.window_size + positions
        window_obs = F.embedding(past, obs)  # obs[past], faster
        window = (window_obs, F.embedding(past, actions), F.embedding(past, next_obs) - window_obs)
        rewards = self.rewards.flatten(0, 1)[episode, t]
        return obs[now], actions[now], next_obs[now], rewards, last, window


# -------------------------------- Acting and learning ---------------------------------


def adam(parameters, lr):
    # capturable: for --cuda-graph
    return torch.optim.Adam(parameters, lr=lr, fused=True, capturable=True)


class Agent(nn.Module):
    """Soft actor-critic with an encoder of the context, which the dynamics loss alone trains."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.args = args
        self.target_entropy = -act_dim
        self.window_size = aib_envs.get_task(args.env_id).window  # K
        self.encoder = Encoder(obs_dim, act_dim, args.mask_prob, args.normalise)
        if args.kl_beta > 0:
            self.encoder = Encoder(obs_dim, act_dim, mask_prob=0.0, normalise=False)
            self.encoder.head = GaussianHead()
        self.dynamics = MLP(obs_dim + act_dim, obs_dim)  # predicts s' - s
        self.actor = Actor(obs_dim, 2 * act_dim)
        self.qf1 = MLP(obs_dim + act_dim, 1)
        self.qf2 = MLP(obs_dim + act_dim, 1)
        self.qf1_target = copy.deepcopy(self.qf1)
        self.qf2_target = copy.deepcopy(self.qf2)
        self.log_alpha = nn.Parameter(torch.zeros(()))

        modules = nn.ModuleList([self.encoder, self.dynamics])
        self.dynamics_parameters = list(modules.parameters())
        self.dynamics_optimizer = adam(self.dynamics_parameters, args.dynamics_lr)
        self.q_optimizer = adam([*self.qf1.parameters(), *self.qf2.parameters()], args.q_lr)
        self.actor_optimizer = adam(self.actor.parameters(), args.policy_lr)
        self.alpha_optimizer = adam([self.log_alpha], args.q_lr)

    def infer(self, window):
        """The window -> z. In training each call masks anew."""
        return self.encoder(*window)

    @torch.inference_mode()
    def act(self, obs, history, training=False):
        """obs [n, obs_dim] -> actions [n, act_dim], sampled in training (all NumPy)."""
        device = self.log_alpha.device
        positions = subsample(len(obs), self.window_size, training).numpy()
        window = [torch.from_numpy(part).to(device) for part in history.window(positions)]
        obs = torch.from_numpy(obs).to(device)
        self.encoder.train(training)
        z = self.infer(window)
        if training:
            actions, _ = self.actor.get_action(obs, z)
        else:
            mean, _ = self.actor(obs, z)
            actions = torch.tanh(mean)
        return actions.cpu().numpy()

    def update(self, obs, actions, next_obs, rewards, last, window, update_policy):
        """One gradient step (Algorithm 1) on a sampled batch. Returns the losses."""
        losses = {}
        obs_actions = torch.cat([obs, actions], 1)

        # Infer z, and predict the dynamics (Eqs. 1, 2).
        self.encoder.train()
        z = self.encoder(*window)
        predicted = self.dynamics(obs_actions, z)
        losses["dynamics_loss"] = F.mse_loss(predicted, next_obs - obs)
        dynamics_objective = losses["dynamics_loss"]
        if self.args.kl_beta > 0:
            losses["kl"] = self.encoder.head.kl
            dynamics_objective = dynamics_objective * (1 + self.args.kl_beta * losses["kl"])
        self.dynamics_optimizer.zero_grad()
        dynamics_objective.backward()  # the optimizer steps last, as in dmash_sac.py

        # From here on z is a constant.
        z = z.detach()

        # Critics. Episodes end by time limit only, so by default the target bootstraps there, too.
        with torch.no_grad():
            next_actions, next_log_pi = self.actor.get_action(next_obs, z)
            next_obs_actions = torch.cat([next_obs, next_actions], 1)
            qf1_next = self.qf1_target(next_obs_actions, z)
            qf2_next = self.qf2_target(next_obs_actions, z)
            min_qf_next = torch.min(qf1_next, qf2_next).squeeze(1)
            alpha = self.log_alpha.exp()
            next_value = min_qf_next - alpha * next_log_pi
            goes_on = ~last | self.args.bootstrap_at_limit  # by default all True
            next_q_value = rewards + goes_on * self.args.gamma * next_value
        qf1 = self.qf1(obs_actions, z).squeeze(1)
        qf2 = self.qf2(obs_actions, z).squeeze(1)
        losses["qf_loss"] = F.mse_loss(qf1, next_q_value) + F.mse_loss(qf2, next_q_value)
        self.q_optimizer.zero_grad()
        losses["qf_loss"].backward()
        self.q_optimizer.step()

        policy_updates = POLICY_FREQUENCY if update_policy else 0
        for _ in range(policy_updates):
            # Policy
            losses["actor_loss"], log_pi = self.actor_loss(obs, z)
            self.actor_optimizer.zero_grad()
            learners = list(self.actor.parameters())  # the Q-functions need no gradients here
            losses["actor_loss"].backward(inputs=learners)
            self.actor_optimizer.step()

            # Temperature
            alpha = self.log_alpha.exp()
            losses["alpha_loss"] = (-alpha * (log_pi.detach() + self.target_entropy)).mean()
            self.alpha_optimizer.zero_grad()
            losses["alpha_loss"].backward()
            self.alpha_optimizer.step()

        self.update_targets()
        self.dynamics_optimizer.step()
        losses["alpha"] = self.log_alpha.exp()
        return {name: loss.detach() for name, loss in losses.items()}

    def actor_loss(self, obs, condition):
        """The policy's loss [], and the log-probabilities [batch] of the actions it samples."""
        pi, log_pi = self.actor.get_action(obs, condition)
        obs_pi = torch.cat([obs, pi], 1)
        min_qf_pi = torch.min(self.qf1(obs_pi, condition), self.qf2(obs_pi, condition)).squeeze(1)
        loss = (self.log_alpha.exp().detach() * log_pi - min_qf_pi).mean()
        return loss, log_pi

    @torch.no_grad()
    def update_targets(self):
        """Moves the target networks a little towards the Q-functions."""
        for qf, target in ((self.qf1, self.qf1_target), (self.qf2, self.qf2_target)):
            for source, slow in zip(qf.parameters(), target.parameters(), strict=True):
                slow.lerp_(source, self.args.tau)

    def diagnose(self, obs, actions, next_obs, rewards, last, window):
        """The shadow gradient: how strongly the policy's loss would pull at z (mean norm)."""
        self.encoder.eval()
        z = self.encoder(*window).detach().requires_grad_()
        loss, _ = self.actor_loss(obs, z)
        (gradient,) = torch.autograd.grad(loss, z)  # [batch, 8]
        gradient = gradient * len(z)  # undoes the loss's mean: each sample's own
        return {"shadow_gradient": gradient.norm(dim=1).mean().item()}


# -------------------------------------- Training --------------------------------------


def make_envs(args, contexts, **options):
    return aib_envs.make_vec(args.env_id, contexts, **options)


def make_agent(args, envs):
    obs_dim = envs.single_observation_space.shape[0]
    act_dim = envs.single_action_space.shape[0]
    return Agent(obs_dim, act_dim, args).to(aib_run.device(args))


def train(args):
    torch.manual_seed(args.seed)
    steps = aib_envs.get_task(args.env_id).steps  # T
    envs = make_envs(args, aib_envs.context_set(args.env_id, "train"))
    eval_envs = make_envs(args, aib_envs.eval_contexts(args.env_id))
    n = envs.num_envs
    obs_dim = envs.single_observation_space.shape[0]
    act_dim = envs.single_action_space.shape[0]
    agent = make_agent(args, envs)
    history = aib_envs.History(n, agent.window_size, steps, obs_dim, act_dim)
    buffer = ReplayBuffer(history, args.buffer_size, aib_run.device(args))
    run = aib_run.Run(args, method_name(args), agent, buffer)  # goes on from a checkpoint

    def evaluate(rollouts):
        returns, diverged = aib_envs.evaluate(eval_envs, agent.act, agent.window_size, rollouts)
        diagnostics = agent.diagnose(*buffer.sample(args.batch_size))
        return returns, diverged, diagnostics

    while run.global_step < args.total_timesteps:
        # An episode in all training contexts at once, after K steps of warm-up (t < 0).
        history.begin()
        for t in range(-agent.window_size, steps):
            if t in (-agent.window_size, 0):  # the warm-up and the episode each begin with a reset
                warm_up = int(t < 0)
                seeds = aib_envs.reset_seeds(n, 0, args.seed, run.episode, warm_up)  # 0: training
                obs, _ = envs.reset(seed=seeds)
            learning = run.episode * steps + max(t, 0) >= args.learning_starts
            actions = 2 * torch.rand(n, act_dim).numpy() - 1  # always drawn: published runs did so
            if learning:
                actions = agent.act(obs, history, training=True)
            next_obs, rewards, _, _, infos = envs.step(actions)
            history.add(obs, actions, rewards, next_obs, infos["diverged"])
            obs = next_obs
            run.add_env_steps(n)
            if t < 0 or not learning:
                continue

            if run.global_step % args.eval_every == 0:
                with torch.random.fork_rng():  # evaluating leaves training's random numbers alone
                    run.log_evaluation(*evaluate(rollouts=1))
            batch = buffer.sample(args.batch_size)
            losses = agent.update(*batch, run.global_step % POLICY_FREQUENCY == 0)
            run.advance(losses)
            if run.global_step == args.total_timesteps:
                break
        if t == steps - 1:  # not so if total_timesteps came first
            buffer.add(history)
            run.end_episode(history)

    run.finish(*evaluate(args.eval_rollouts))
    return run


if __name__ == "__main__":
    aib_run.main(Args, train, make_envs, make_agent)
