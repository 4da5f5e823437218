"""Statistics of the report: interquartile means, bootstrap intervals, exact tests, verdicts.

Values of several tasks come as `groups`, one array [seeds] a task. Every task has the same weight, however many seeds
it has.
"""

import numpy as np
import scipy.signal
import scipy.stats

LEVEL = 0.05
GRID = 10_000  # steps between 0 and 1, in which the test over several tasks counts


def iqm(values, axis=-1):
    """Interquartile mean: the mean of the middle half (Agarwal et al. 2021); of three values or fewer, their mean."""
    return scipy.stats.trim_mean(values, 0.25, axis=axis)


def pooled_iqm(*groups, axis=-1):
    """Interquartile mean of all values of the groups [..., seeds], the middle half by weight: [...]."""
    values = np.concatenate(groups, axis=-1)
    weights = np.concatenate([np.full(group.shape[-1], 1 / group.shape[-1]) for group in groups]) / len(groups)
    order = values.argsort(-1)
    values = np.take_along_axis(values, order, -1)
    weights = weights[order]
    upper = weights.cumsum(-1)  # the share of the weight that lies at a value or below
    inside = upper.clip(0.25, 0.75) - (upper - weights).clip(0.25, 0.75)
    return 2 * (inside * values).sum(-1)


def pooled_mean(*groups, axis=-1):
    """The plain mean over tasks of the means of the groups [..., seeds]: [...]."""
    return np.mean([group.mean(-1) for group in groups], axis=0)


def difference(statistic):
    """`statistic` of the first half of the groups minus that of the second half."""

    def of_halves(*groups, axis=-1):
        half = len(groups) // 2
        return statistic(*groups[:half]) - statistic(*groups[half:])

    return of_halves


def interval(groups, statistic, axis=-1):
    """95 % bootstrap interval (low, high) of `statistic(*groups)`, seeds resampled within each task; None where a task
    has fewer than three seeds, of which an interval would cover far less than it says."""
    if min(np.shape(group)[axis] for group in groups) < 3:
        return None
    options = {"method": "percentile", "n_resamples": 2000, "vectorized": True, "rng": 0}
    found = scipy.stats.bootstrap(groups, statistic, axis=axis, **options)
    return found.confidence_interval.low, found.confidence_interval.high


def improvement(x, y):
    """Probability that a value of x [n] is above one of y [m]; ties count half. It is Mann and Whitney's U / nm."""
    return (np.sign(np.subtract.outer(x, y)).mean() + 1) / 2


def deals(x, y):
    """All ways to deal out the values to the two methods: array [GRID + 1] of the shares of ways in which
    `improvement`, rounded to the grid, is 0, 1 / GRID, 2 / GRID, ..."""
    n, m = len(x), len(y)
    doubled = (2 * scipy.stats.rankdata([*x, *y])).astype(int)  # whole numbers, with ties too
    ways = np.zeros((n + 1, doubled.sum() + 1))  # [how many are dealt to x, their sum of ranks]
    ways[0, 0] = 1
    for rank in doubled:
        ways[1:, rank:] += ways[:-1, :-rank].copy()
    (sums,) = ways[n].nonzero()
    chances = (sums / 2 - n * (n + 1) / 2) / (n * m)
    shares = np.zeros(GRID + 1)
    np.add.at(shares, (chances * GRID).round().astype(int), ways[n][sums] / ways[n].sum())
    return shares


def p_value(pairs):
    """One-sided exact p-value that the first method is better: in what share of all ways to deal out each task's values
    to the two methods `improvement`, averaged over tasks, is as high as found. `pairs`: (x [n], y [m]) of each task.
    For one task this is Mann and Whitney's test."""
    shares = np.ones(1)
    for x, y in pairs:
        shares = scipy.signal.fftconvolve(shares, deals(x, y))
    found = sum(improvement(x, y) for x, y in pairs) * GRID
    first = max(int(np.ceil(found - len(pairs) / 2 - 1e-6)), 0)  # each task is rounded by half a step at most
    return round(min(float(shares[first:].sum()), 1.0), 9)


def smallest_p(pairs):
    """The p-value of the clearest result that so many values can have."""
    return p_value([(np.arange(len(x)) + len(y), np.arange(len(y))) for x, y in pairs])


def holm(p_values):
    """Holm's correction of p-values that were asked together."""
    p_values = np.asarray(p_values, float)
    order = p_values.argsort()
    adjusted = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.maximum.accumulate(adjusted).clip(max=1)
    found = np.empty_like(adjusted)
    found[order] = adjusted
    return found


def verdicts(questions):
    """Is the first method better? A dict for each of `questions` (`pairs` each), which are asked together: `chance`,
    the probability of improvement averaged over tasks; `p`, one-sided; `asked`, how many of the questions could be
    decided with so many seeds at all; `holm`, p corrected for that number; `verdict`, "holds", "does not hold" (the
    opposite does), "undecided" or "too few seeds"."""
    forward = [p_value(pairs) for pairs in questions]
    backward = [p_value([(y, x) for x, y in pairs]) for pairs in questions]
    asked = [i for i, pairs in enumerate(questions) if smallest_p(pairs) <= LEVEL]
    holds = dict(zip(asked, holm([forward[i] for i in asked]), strict=True))
    fails = dict(zip(asked, holm([backward[i] for i in asked]), strict=True))
    found = []
    for i, pairs in enumerate(questions):
        if i not in asked:
            verdict = "too few seeds"
        elif holds[i] <= LEVEL:
            verdict = "holds"
        elif fails[i] <= LEVEL:
            verdict = "does not hold"
        else:
            verdict = "undecided"
        chance = float(np.mean([improvement(x, y) for x, y in pairs]))
        row = {"chance": chance, "p": forward[i], "asked": len(asked), "holm": holds.get(i), "verdict": verdict}
        found.append(row)
    return found
