"""HyperDynamics (Xian et al., ICLR 2021, arXiv 2103.09439): planning with generated models, in one file.

The agent meets a world whose dynamics (context) change from episode to episode, and nobody tells it how. An encoder
turns the last 16 transitions into a small code, a hypernetwork turns the code into a whole forward model of this world,
and the agent plans with it (model-predictive control, MPC); there is no policy. --model takes another model instead:
one for all contexts without a code (global), with the code as an input (concat) or with a recurrent state (recurrent),
or one for each training context (expert). Start it with: python relatives/hyperdynamics.py --env-id DI
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import aib_envs
import aib_run

# ----------------------------------------------------- Arguments ------------------------------------------------------


@dataclass
class Args(aib_run.Args):  # --env-id, --seed, --run-dir, --resume, ... stand in aib_run.py
    total_timesteps: aib_run.Count | None = 10_000  # vector steps (one in every context) with MPC
    eval_every: aib_run.Count = 2_500  # steps between evaluations with 1 rollout per context
    learning_starts: aib_run.EpisodeOrMore = 2_000  # random vector steps that come first, in whole episodes
    buffer_size: aib_run.EpisodeOrMore = 100_000  # transitions per context in the replay buffer
    batch_size: aib_run.Count = 128  # transitions per gradient step (of each expert)
    lr: aib_run.Fraction = 1e-3  # learning rate
    updates_per_round: aib_run.Count = 2_000  # gradient steps after each episode, the random ones included
    model: Literal["hyper", "global", "concat", "recurrent", "expert"] = "hyper"  # what predicts the next state
    code_dim: Annotated[int, aib_run.Bounds(1, 4096)] = 8  # size of the code of models hyper and concat
    planner: Literal["shooting", "cem"] = "shooting"  # random shooting, or the cross-entropy method
    candidates: aib_run.Count = 500  # action sequences that are compared (by CEM: in each of its 5 iterations)
    horizon: aib_run.Count = 20  # steps that the planner looks ahead
    action_hold: aib_run.Count = 10  # steps for which a candidate holds each of its random actions (the paper: 1)
    predict_only: bool = False  # no MPC: all actions are random, also those of the returns; for tasks without a reward


WIDTH = 128  # size of the networks' layers
WINDOW = 16  # transitions from which the context is inferred
CEM_ITERATIONS = 5  # rounds of candidates, each drawn around the best tenth of the round before


def method_name(args):
    """The method's name with these flags, as in tools/methods.py."""
    if args.env_id not in REWARDS and not args.predict_only:
        aib_run.fail(f"the planner knows no reward of {args.env_id}: --predict-only, or {', '.join(REWARDS)}")
    name = "HyperDynamics"
    if args.model != "hyper":
        name += f"-{args.model}"
    if args.predict_only:
        name += "-random"
    elif args.planner == "cem":
        name += "-cem"
    return name


# ------------------------------------------------ Rewards of the planner ----------------------------------------------
# Functions of obs [..., obs_dim], action [..., act_dim] and next_obs that give the environment's reward [...]. Those of
# dm_control's tasks are written with its `tolerance`: 1 within bounds and, where there is a margin, at a distance of d
# margins either 0.1 ** (d * d) (gaussian) or max(1 - d * d, 0) (quadratic).


def di_reward(obs, action, next_obs):
    """Distance from the origin at most 0.1."""
    return (next_obs[..., :2].norm(dim=-1) <= 0.1).float()


def ode_reward(obs, action, next_obs):
    bounds = torch.tensor([0.05, 0.1, 0.2, 0.5, 2.0], device=next_obs.device)
    levels = torch.tensor([1.0, 1 / 2, 1 / 3, 1 / 4, 0.05, 0.0], device=next_obs.device)
    return levels[torch.bucketize(next_obs[..., 0].abs(), bounds, right=True)]


def cartpole_reward(obs, action, next_obs):
    position, cosine, _, _, angular_velocity = next_obs.unbind(-1)
    upright = (cosine.clamp(-1, 1) + 1) / 2
    centered = (1 + 0.1 ** (position / 2).square()) / 2
    small_control = (4 + (1 - action[..., 0].square()).clamp(min=0)) / 5
    small_velocity = (1 + 0.1 ** (angular_velocity / 5).square()) / 2
    return upright * small_control * small_velocity * centered


def reacher_easy_reward(obs, action, next_obs):
    """Distance from finger to target at most the radii of both, 0.06 m."""
    return (next_obs[..., 2:4].norm(dim=-1) <= 0.06).float()


def reacher_hard_reward(obs, action, next_obs):
    """The same with a small target: 0.025 m."""
    return (next_obs[..., 2:4].norm(dim=-1) <= 0.025).float()


REWARDS = {  # by task; those that are not here have rewards that do not follow from the observations
    "DI": di_reward,
    "DI-Friction": di_reward,
    "DI-Perm": di_reward,
    "ODE": ode_reward,
    **{f"ODE-{k}": ode_reward for k in range(1, 21)},
    "Cartpole": cartpole_reward,
    "Reacher-E": reacher_easy_reward,
    "Reacher-H": reacher_hard_reward,
    "Reacher-H-Perm": reacher_hard_reward,
}

# -------------------------- Networks: encoder, hypernetwork and the forward models that it generates ------------------
# A forward model maps normalised (s, a) to the normalised state difference. It is a list of matrices [in + 1, out], one
# for each layer, the last row being the bias; or of stacks of them [n, in + 1, out], for n environments or experts.


def new_model(inputs, outputs, *stack):
    """A forward model, or a stack of them, which starts as layers of PyTorch do."""
    model = nn.ParameterList()
    for i, o in ((inputs, WIDTH), (WIDTH, WIDTH), (WIDTH, outputs)):
        uniform = torch.empty(*stack, i + 1, o).uniform_(-1, 1)
        model.append(uniform / i**0.5)
    return model


def forward_model(model, x):
    """x [..., m, in] -> [..., m, out]. A stack of models takes a stack of inputs, in one matrix product a layer."""
    for matrix in model:
        weight = matrix[..., :-1, :]
        bias = matrix[..., -1:, :]
        x = (x @ weight).add_(bias)
        if matrix is not model[-1]:
            x = torch.relu_(x)
    return x


class Hypernetwork(nn.Module):
    """One linear layer from the code to all parameters of a forward model: for each of that model's matrices there is
    one matrix for each entry of the code, which starts with standard deviation 0.1 (the paper's), and one that is added
    always, which starts at 0. So generated parameters start with a standard deviation of 0.1 times the code's norm."""

    def __init__(self, code_dim, inputs, outputs):
        super().__init__()
        self.heads = new_model(inputs, outputs, code_dim + 1)  # each [code_dim + 1, in + 1, out]
        for head in self.heads:
            nn.init.normal_(head, std=0.1)
            nn.init.zeros_(head[-1])

    def generate(self, code):
        """The definition: a stack of models, one for each code [n, code_dim]. The planner uses it, whose codes have
        many inputs each."""
        code = F.pad(code, (0, 1), value=1.0)
        return [torch.einsum("nc,cio->nio", code, head) for head in self.heads]

    def forward(self, code, x):
        """What the model of each code [..., code_dim] makes of its one x [..., in]. Models are not built here, for
        their layers are linear in the products of the code's entries with the input's."""
        code = F.pad(code, (0, 1), value=1.0)
        for head in self.heads:
            x = F.pad(x, (0, 1), value=1.0)
            products = code[..., None] * x[..., None, :]  # [..., code_dim + 1, in + 1]
            x = products.flatten(-2) @ head.flatten(0, 1)
            if head is not self.heads[-1]:
                x = torch.relu_(x)
        return x


# ---------------------------------------------------- Replay buffer ---------------------------------------------------


class ReplayBuffer:
    """Finished episodes of all contexts, laid out as in aib_envs.History: K steps of warm-up, then the episode's T."""

    def __init__(self, history, buffer_size, device):
        num_envs, steps = history.rewards.shape
        self.num_episodes = buffer_size // steps  # of each context
        self.num_added = 0
        self.window_size = history.window_size
        shape = (num_envs, self.num_episodes)
        self.obs = torch.zeros(*shape, *history.obs.shape[1:], device=device)
        self.next_obs = torch.zeros_like(self.obs)
        self.actions = torch.zeros(*shape, *history.actions.shape[1:], device=device)
        self.lengths = torch.zeros(*shape, dtype=torch.long, device=device)  # until the simulation diverged, if it did

    def add(self, history):
        """Stores a finished episode, in the place of the oldest."""
        i = self.num_added % self.num_episodes
        self.obs[:, i] = torch.from_numpy(history.obs)
        self.next_obs[:, i] = torch.from_numpy(history.next_obs)
        self.actions[:, i] = torch.from_numpy(history.actions)
        self.lengths[:, i] = torch.from_numpy(history.lengths)
        self.num_added += 1

    def at(self, episode, t):
        """Steps t [...] of episodes [...], which are numbered context by context: obs, actions, next_obs, all
        [..., dim], and the K transitions before them: (obs, actions), both [..., K, dim]."""
        obs = self.obs.flatten(0, 1)  # [episodes, K + T, obs_dim]
        next_obs = self.next_obs.flatten(0, 1)
        actions = self.actions.flatten(0, 1)
        now = self.window_size + t
        past = t[..., None] + torch.arange(self.window_size, device=t.device)  # all before `now`
        row = episode[..., None]
        window = (obs[row, past], actions[row, past])
        return obs[episode, now], actions[episode, now], next_obs[episode, now], window

    def sample(self, batch_size, each_context=False):
        """Steps drawn uniformly from all finished episodes [batch], or from each context's [n, batch]: as in `at`."""
        lengths = self.lengths if each_context else self.lengths.flatten()[None]  # [lists, episodes]
        num_lists, num_episodes = lengths.shape
        ends = lengths.cumsum(1)  # where each episode ends in a list of steps
        random = torch.rand(num_lists, batch_size, dtype=torch.float64, device=ends.device)
        i = (random * ends[:, -1:]).long()
        episode = torch.searchsorted(ends, i, right=True)  # the one that step i lies in
        episode = episode.clamp(max=num_episodes - 1)  # of a list without any step
        t = i - ends.gather(1, episode) + lengths.gather(1, episode)
        episode += torch.arange(num_lists, device=ends.device)[:, None] * num_episodes
        return self.at(episode, t) if each_context else self.at(episode[0], t[0])


# ------------------------------------------------ Acting and learning -------------------------------------------------


class Agent(nn.Module):
    """Infers a code from the window, generates a model from it, and plans with the model.

    With --model expert, observations end with the true (scaled) context. The models do not see it: it tells which
    expert is asked, the one of the nearest training context."""

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        self.args = args
        self.act_dim = act_dim
        self.obs_dim = aib_envs.get_task(args.env_id).obs_dim  # without the context
        inputs = self.obs_dim + act_dim
        contexts = aib_envs.context_set(args.env_id, "train")
        code_dim = {"hyper": args.code_dim, "concat": args.code_dim, "recurrent": WIDTH}.get(args.model, 0)
        self.window_size = WINDOW if code_dim else 0  # without a window no warm-up

        if args.model == "recurrent":
            self.history_encoder = nn.GRU(inputs, WIDTH, batch_first=True)
        elif code_dim:
            self.history_encoder = nn.Sequential(
                nn.Flatten(-2),
                nn.Linear(WINDOW * inputs, WIDTH),
                nn.ReLU(),
                nn.Linear(WIDTH, WIDTH),
                nn.ReLU(),
                nn.Linear(WIDTH, code_dim),
            )
        if args.model == "hyper":
            self.hypernetwork = Hypernetwork(code_dim, inputs, self.obs_dim)
            self.model = None
        elif args.model == "expert":
            self.model = new_model(inputs, self.obs_dim, len(contexts))
        else:
            self.model = new_model(inputs + code_dim, self.obs_dim)

        vectors = [aib_envs.context_vector(args.env_id, context, scaled=True) for context in contexts]
        self.register_buffer("contexts", torch.from_numpy(np.stack(vectors)))
        self.register_buffer("mean", torch.zeros(inputs + self.obs_dim))  # of obs, actions and state differences
        self.register_buffer("std", torch.ones(inputs + self.obs_dim))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=args.lr, fused=True, capturable=True)

    def set_scales(self, obs, actions, next_obs):
        """Takes over mean and standard deviation of the data [steps, dim]."""
        deltas = (next_obs - obs)[:, : self.obs_dim]
        x = torch.cat([obs[:, : self.obs_dim], actions, deltas], 1)
        self.mean.copy_(x.mean(0))
        self.std.copy_(x.std(0).clamp(min=1e-6))

    def normalise(self, obs, actions):
        """(s, a) [..., inputs], without the true context."""
        x = torch.cat([obs[..., : self.obs_dim], actions], -1)
        return (x - self.mean[: -self.obs_dim]) / self.std[: -self.obs_dim]

    def infer(self, window, known=1.0):
        """The code [..., code_dim] of a window (obs, actions), both [..., K, dim], of which only a part may be `known`
        (1, else 0). For models without a window it is empty."""
        obs, actions = window
        if not self.window_size:
            return obs.new_empty(*obs.shape[:-2], 0)
        x = self.normalise(obs, actions) * known
        if self.args.model == "recurrent":
            states, _ = self.history_encoder(x.flatten(0, -3))
            return states[:, -1].unflatten(0, x.shape[:-2])
        return self.history_encoder(x)

    def models(self, obs, code):
        """Forward models of n environments, a stack or one for all, and the code [n, ...] that is still an input."""
        if self.args.model == "hyper":
            return self.hypernetwork.generate(code), code[..., :0]
        if self.args.model == "expert":
            distances = (obs[:, None, self.obs_dim :] - self.contexts).square().sum(-1)  # [n, contexts]
            nearest = distances.argmin(1)
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
        code = self.infer(window)
        predicted = self.predict(obs, actions, code, self.model)
        errors = predicted - (next_obs - obs)[..., : self.obs_dim]
        loss = (errors / self.std[-self.obs_dim :]).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"dynamics_loss": loss.detach()}

    @torch.inference_mode()
    def act(self, obs, history, training=False):
        """obs [n, obs_dim] -> actions [n, act_dim] (all NumPy), planned anew at every step. In evaluation the planner's
        random numbers depend only on the step of the episode and on an environment's place among the n."""
        device = self.mean.device
        generator = None
        if not training:
            generator = torch.Generator(device).manual_seed(history.t + WINDOW)
        if self.args.predict_only:
            random = torch.rand(len(obs), self.act_dim, generator=generator, device=device)
            return 2 * random.cpu().numpy() - 1

        places = np.arange(self.window_size)
        past_obs, past_actions, _ = history.window(places[None])
        window = (torch.from_numpy(past_obs).to(device), torch.from_numpy(past_actions).to(device))
        known = history.t + places >= 0  # what lies before the warm-up is not
        known = torch.from_numpy(known.astype(np.float32)[:, None]).to(device)
        code = self.infer(window, known)
        obs = torch.from_numpy(obs).to(device)

        some = len(obs)  # environments that are planned for at once
        if device.type == "cpu":
            some = max(2_500 // self.args.candidates, 1)  # what a cache can hold
        pairs = zip(obs.split(some), code.split(some), strict=True)
        actions = [self.plan(some_obs, some_code, generator) for some_obs, some_code in pairs]
        return torch.cat(actions).cpu().numpy()

    def plan(self, obs, code, generator):
        """The first action [n, act_dim] of the best of many random plans for each obs [n, ...]. A plan is a few actions
        that are held for --action-hold steps each; the best one promises the greatest sum of rewards."""
        n = len(obs)
        m = self.args.candidates
        count = -(-self.args.horizon // self.args.action_hold)
        row = torch.arange(n, device=obs.device)
        model, code = self.models(obs, code)
        plans = 2 * torch.rand(n, m, count, self.act_dim, generator=generator, device=obs.device) - 1
        for _ in range(CEM_ITERATIONS - 1 if self.args.planner == "cem" else 0):
            returns = self.rollout(obs, code, model, plans)
            best = returns.topk(max(m // 10, 1)).indices
            elites = plans[row[:, None], best]  # [n, m // 10, count, act_dim]
            mean = elites.mean(1, keepdim=True)
            std = elites.std(1, correction=0, keepdim=True)
            noise = torch.randn(plans.shape, generator=generator, device=obs.device)
            plans = (mean + std * noise).clamp_(-1, 1)
            plans[:, 0] = elites[:, 0]  # the best so far
        returns = self.rollout(obs, code, model, plans)
        return plans[row, returns.argmax(1), 0]

    def rollout(self, obs, code, model, plans):
        """Predicted returns [n, m] of m plans [n, m, count, act_dim] for each of n environments, all at once."""
        n, m = plans.shape[:2]
        reward = REWARDS[self.args.env_id]
        returns = torch.zeros(n, m, device=obs.device)
        obs = obs[:, None, : self.obs_dim].expand(n, m, -1)
        code = code[:, None].expand(n, m, -1)
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
        n = len(episodes.lengths)
        device = episodes.obs.device
        t = torch.linspace(0, episodes.lengths.max() - steps, starts, device=device).long().expand(n, starts)
        episode = torch.arange(n, device=device)[:, None].expand(n, starts)
        obs, _, _, window = episodes.at(episode, t)
        code = self.infer(window)
        model = None
        if self.args.model != "hyper":
            model, code = self.models(obs[:, 0], code)

        errors = []
        predicted = obs[..., : self.obs_dim]
        for step in range(steps):
            _, actions, next_obs, _ = episodes.at(episode, t + step)
            predicted = predicted + self.predict(predicted, actions, code, model)
            errors.append(predicted - next_obs[..., : self.obs_dim])  # [n, starts, obs_dim]
        valid = t + steps <= episodes.lengths  # what does not reach beyond a divergence
        return {
            "one_step": self._by_split(errors[0] / self.std[-self.obs_dim :], valid),
            "twenty_step": self._by_split(errors[-1] / self.std[: self.obs_dim], valid),
        }

    def _by_split(self, errors, valid):
        """Mean squares of the valid ones of errors [60, starts, obs_dim] in each set."""
        parts = zip(aib_envs.SPLITS, errors.chunk(3), valid.chunk(3), strict=True)
        return {split: some[which].square().mean().item() for split, some, which in parts}


# ------------------------------------------------------ Training ------------------------------------------------------


def make_envs(args, contexts, **options):
    if args.model == "expert":
        options["observe_context"] = "scaled"
    return aib_envs.make_vec(args.env_id, contexts, **options)


def make_agent(args, envs):
    obs_dim = envs.single_observation_space.shape[0]
    act_dim = envs.single_action_space.shape[0]
    return Agent(obs_dim, act_dim, args).to(aib_run.device(args))


def random_episodes(envs, device):
    """An episode of uniform random actions in each environment, after a warm-up: always the same ones."""
    histories = []
    envs.action_space.seed(0)

    def policy(obs, history):
        histories.append(history)
        return envs.action_space.sample()

    aib_envs.evaluate(envs, policy, WINDOW, rollouts=1)
    history = histories[-1]
    episodes = ReplayBuffer(history, history.rewards.shape[1], device)
    episodes.add(history)
    return episodes


def train(args):
    torch.manual_seed(args.seed)
    method = method_name(args)
    steps = aib_envs.get_task(args.env_id).steps
    envs = make_envs(args, aib_envs.context_set(args.env_id, "train"))
    eval_envs = make_envs(args, aib_envs.eval_contexts(args.env_id))
    n = envs.num_envs
    act_dim = envs.single_action_space.shape[0]
    agent = make_agent(args, envs)
    history = aib_envs.History(n, agent.window_size, steps, envs.single_observation_space.shape[0], act_dim)
    buffer = ReplayBuffer(history, args.buffer_size, aib_run.device(args))
    run = aib_run.Run(args, method, agent, buffer)  # goes on from its checkpoint, if it has one
    episodes = random_episodes(eval_envs, aib_run.device(args))

    while run.global_step < args.total_timesteps:
        # A round: an episode in all training contexts at once, then the model is fitted to all data. Before the episode
        # comes a warm-up (t < 0), which fills the window. The first rounds are of random actions.
        history.begin()
        planning = run.episode * steps >= args.learning_starts
        for t in range(-agent.window_size, steps):
            if t in (-agent.window_size, 0):
                obs, _ = envs.reset(seed=aib_envs.reset_seeds(n, 0, args.seed, run.episode, int(t < 0)))
            if t >= 0 and planning and run.global_step % args.eval_every == 0:
                evaluation = aib_envs.evaluate(eval_envs, agent.act, agent.window_size, rollouts=1)
                run.log_evaluation(*evaluation, {"prediction": agent.prediction_errors(episodes)})
            actions = 2 * torch.rand(n, act_dim).numpy() - 1
            if planning:
                actions = agent.act(obs, history, training=True)
            next_obs, rewards, _, _, infos = envs.step(actions)
            history.add(obs, actions, rewards, next_obs, infos["diverged"])
            obs = next_obs
            run.add_env_steps(n)
            if t >= 0 and planning:
                run.advance({})  # the model is the same for a whole episode
                if run.global_step == args.total_timesteps:
                    break
        if t == steps - 1:  # not so if total_timesteps came first
            buffer.add(history)
            agent.set_scales(*buffer.sample(10_000)[:3])
            for _ in range(args.updates_per_round):
                losses = agent.update(*buffer.sample(args.batch_size, each_context=args.model == "expert"))
            run.add_losses(losses)
            run.end_episode(history)

    evaluation = aib_envs.evaluate(eval_envs, agent.act, agent.window_size, args.eval_rollouts)
    run.finish(*evaluation, {"prediction": agent.prediction_errors(episodes)})
    return run


if __name__ == "__main__":
    aib_run.main(Args, train, make_envs, make_agent)
