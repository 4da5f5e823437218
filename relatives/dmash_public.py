"""DMA*-SH with what the authors' public code does otherwise than the paper's text and dmash_sac.py: an experiment.

docs/differences.md lists the differences and why we decide otherwise. Here are its items 4, 6, 7, 8 and 10: a fresh
mask and encoding for every loss, the encoder's step first, windows that may hold the transition that is to be
predicted, a deterministic warm-up that begins with the last episode's window, and new actions for the temperature.
--no-public-steps leaves these out. --unchunked, item 1, makes all adapter weights with one output layer, and
--no-bootstrap-at-limit is item 3. Equal shares of contexts in a batch (9), the evaluation (5, 11) and the seeds (12)
stay ours.
Start it with: python relatives/dmash_public.py --env-id DI --unchunked --no-bootstrap-at-limit
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import aib_envs
import aib_run
import dmash_sac
from dmash_sac import (
    BOTTLENECK,
    FEATURES,
    POLICY_FREQUENCY,
    WIDTH,
    Z_DIM,
    Omega,
    adam,
    make_envs,
    split_biases,
    subsample,
)

# ----------------------------------------------------- Arguments ------------------------------------------------------


@dataclass
class Args(dmash_sac.Args):
    public_steps: bool = True  # train as the authors' public code does?
    unchunked: bool = False  # does one output layer generate all adapter weights?


def method_name(args):
    """The method's name with these flags, as in tools/methods.py."""
    if args.public_steps and not (args.detach_critic and args.detach_actor):
        aib_run.fail("--no-detach-critic and --no-detach-actor need --no-public-steps")
    public = "-public" if args.public_steps else ""
    return dmash_sac.method_name(args) + public + ("-unchunked" if args.unchunked else "")


# ------------------------------------------------ Unchunked hypernetwork ----------------------------------------------


class UnchunkedHypernetwork(nn.Module):
    """z [batch, inputs] -> omega. Row k of the output layer makes weight k of the adapter: one chunk of 16,672."""

    def __init__(self, inputs):
        super().__init__()
        self.first = nn.Linear(inputs, FEATURES)
        self.second = nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, 2 * BOTTLENECK * WIDTH + BOTTLENECK + WIDTH)

    def features(self, z):
        """What the output layer and its bias see: [batch, 65]."""
        return F.pad(F.relu(self.second(F.relu(self.first(z)))), (0, 1), value=1.0)

    def forward(self, z):
        features = self.features(z)
        head = torch.cat([self.head.weight, self.head.bias[:, None]], dim=1)  # [16672, 65]
        down, up, biases = head.split([BOTTLENECK * WIDTH, WIDTH * BOTTLENECK, BOTTLENECK + WIDTH])
        b_down, b_up = split_biases(F.linear(features, biases))
        return Omega(
            down=features[:, None],
            up=features[:, None],
            b_down=b_down,
            b_up=b_up,
            head_down=down.view(BOTTLENECK, WIDTH, FEATURES + 1).transpose(0, 1).flatten(1),
            head_up=up.view(WIDTH, BOTTLENECK, FEATURES + 1).transpose(0, 1).flatten(1),
        )


# ---------------------------------------------- Windows, acting and learning ------------------------------------------


class History(aib_envs.History):
    """An episode whose warm-up still sees the end of the last one."""

    def window(self, positions, with_rewards=False):
        index = self.t + positions  # below 0: counted from the end of the last episode
        past = np.arange(len(self.obs))[:, None], index
        obs = self.obs[past]
        return obs, self.actions[past], self.next_obs[past] - obs

    def restore(self, buffer):
        """Takes the last episode from a buffer that comes from a checkpoint."""
        if buffer.num_added:
            i = (buffer.num_added - 1) % buffer.num_episodes
            for name in ("obs", "actions", "next_obs"):
                getattr(self, name)[:] = getattr(buffer, name)[:, i].cpu().numpy()


class ReplayBuffer(dmash_sac.ReplayBuffer):
    """Its windows end with the transition that is to be predicted."""

    def sample(self, batch_size):
        device = self.obs.device
        obs, next_obs, actions = (part.flatten(0, 2) for part in (self.obs, self.next_obs, self.actions))

        i = torch.randint(self.total, (batch_size,), device=device)
        episode = torch.searchsorted(self.ends, i, right=True)
        t = i - self.begins[episode]
        last = t == self.rewards.shape[2] - 1
        now = episode * self.obs.shape[2] + self.window_size + t

        age = self.window_size - 1 - subsample(batch_size, self.window_size, training=True, device=device)
        past = now[:, None] - age  # age 0: the transition itself
        window_obs = obs[past]
        window = (window_obs, actions[past], next_obs[past] - window_obs)
        return obs[now], actions[now], next_obs[now], self.rewards.flatten(0, 1)[episode, t], last, window


class Agent(dmash_sac.Agent):
    """DMA*-SH whose losses each infer their own z."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__(obs_dim, act_dim, args)
        if args.unchunked:
            self.hypernetwork = UnchunkedHypernetwork(Z_DIM)
            modules = nn.ModuleList([self.encoder, self.hypernetwork, self.dynamics])
            self.dynamics_parameters = list(modules.parameters())
            self.dynamics_optimizer = adam(self.dynamics_parameters, args.dynamics_lr)

    def update(self, obs, actions, next_obs, rewards, last, window, update_policy):
        """One gradient step on a sampled batch. Returns the losses."""
        if not self.args.public_steps:
            return super().update(obs, actions, next_obs, rewards, last, window, update_policy)
        losses = {}
        obs_actions = torch.cat([obs, actions], 1)
        self.encoder.train()

        # Encoder, hypernetwork and dynamics model
        predicted = self.dynamics(obs_actions, self.infer(window))
        losses["dynamics_loss"] = F.mse_loss(predicted, next_obs - obs)
        self.dynamics_optimizer.zero_grad()
        losses["dynamics_loss"].backward()
        self.dynamics_optimizer.step()

        # Critics
        with torch.no_grad():
            omega = self.infer(window)
            next_actions, next_log_pi = self.actor.get_action(next_obs, omega)
            next_obs_actions = torch.cat([next_obs, next_actions], 1)
            qf1_next = self.qf1_target(next_obs_actions, omega)
            qf2_next = self.qf2_target(next_obs_actions, omega)
            min_qf_next = torch.min(qf1_next, qf2_next).squeeze(1)
            alpha = self.log_alpha.exp()
            goes_on = ~last | self.args.bootstrap_at_limit
            next_q_value = rewards + goes_on * self.args.gamma * (min_qf_next - alpha * next_log_pi)
        qf1 = self.qf1(obs_actions, omega).squeeze(1)
        qf2 = self.qf2(obs_actions, omega).squeeze(1)
        losses["qf_loss"] = F.mse_loss(qf1, next_q_value) + F.mse_loss(qf2, next_q_value)
        self.q_optimizer.zero_grad()
        losses["qf_loss"].backward()
        self.q_optimizer.step()

        policy_updates = POLICY_FREQUENCY if update_policy else 0
        for _ in range(policy_updates):
            # Policy
            with torch.no_grad():
                omega = self.infer(window)
            losses["actor_loss"], log_pi = self.actor_loss(obs, omega)
            self.actor_optimizer.zero_grad()
            losses["actor_loss"].backward(inputs=list(self.actor.parameters()))
            self.actor_optimizer.step()

            # Temperature, with new actions
            with torch.no_grad():
                _, log_pi = self.actor.get_action(obs, omega)
            alpha = self.log_alpha.exp()
            losses["alpha_loss"] = (-alpha * (log_pi + self.target_entropy)).mean()
            self.alpha_optimizer.zero_grad()
            losses["alpha_loss"].backward()
            self.alpha_optimizer.step()

        self.update_targets()
        losses["alpha"] = self.log_alpha.exp()
        return {name: loss.detach() for name, loss in losses.items()}


# ------------------------------------------------------ Training ------------------------------------------------------


def make_agent(args, envs):
    obs_dim = envs.single_observation_space.shape[0]
    act_dim = envs.single_action_space.shape[0]
    return Agent(obs_dim, act_dim, args).to(aib_run.device(args))


def train(args):
    torch.manual_seed(args.seed)
    steps = aib_envs.get_task(args.env_id).steps
    envs = make_envs(args, aib_envs.context_set(args.env_id, "train"))
    eval_envs = make_envs(args, aib_envs.eval_contexts(args.env_id))
    n = envs.num_envs
    obs_dim = envs.single_observation_space.shape[0]
    act_dim = envs.single_action_space.shape[0]
    agent = make_agent(args, envs)
    history_class, buffer_class = aib_envs.History, dmash_sac.ReplayBuffer
    if args.public_steps:
        history_class, buffer_class = History, ReplayBuffer
    history = history_class(n, agent.window_size, steps, obs_dim, act_dim)
    buffer = buffer_class(history, args.buffer_size, aib_run.device(args))
    run = aib_run.Run(args, method_name(args), agent, buffer)  # goes on from its checkpoint, if it has one
    if args.public_steps:
        history.restore(buffer)

    def evaluate(rollouts):
        returns, diverged = aib_envs.evaluate(eval_envs, agent.act, agent.window_size, rollouts)
        diagnostics = agent.diagnose(*buffer.sample(args.batch_size))
        return returns, diverged, diagnostics

    while run.global_step < args.total_timesteps:
        # An episode in all training contexts at once. Before it comes a warm-up (t < 0), which fills the window.
        history.begin()
        for t in range(-agent.window_size, steps):
            if t in (-agent.window_size, 0):  # the warm-up and the episode each begin with a reset
                obs, _ = envs.reset(seed=aib_envs.reset_seeds(n, 0, args.seed, run.episode, int(t < 0)))
            learning = run.episode * steps + max(t, 0) >= args.learning_starts
            actions = 2 * torch.rand(n, act_dim).numpy() - 1  # at first random ones
            if learning:
                actions = agent.act(obs, history, training=t >= 0 or not args.public_steps)
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
