"""tools/stats.py against closed forms, scipy and simulation."""

import numpy as np
import pytest
import scipy.stats

import stats


def test_interquartile_mean():
    assert stats.iqm(np.array([1.0, 2, 3, 100])) == 2.5
    assert stats.iqm(np.array([5.0, 1, 3])) == 3  # nothing to trim
    assert stats.iqm(np.arange(12.0).reshape(3, 4)).tolist() == [1.5, 5.5, 9.5]


def test_pooled_mean_of_equally_many_seeds_is_the_plain_one():
    groups = list(np.random.default_rng(0).normal(size=(4, 3)))  # twelve values, three of them cut off on each side
    assert stats.pooled_iqm(*groups) == pytest.approx(scipy.stats.trim_mean(np.ravel(groups), 0.25))
    assert stats.pooled_mean(*groups) == pytest.approx(np.mean(groups))


def test_every_task_has_the_same_weight():
    groups = [np.array([60.0, 75, 90]), np.array([50.0, 30])]
    # of 60 60 75 75 90 90 and 30 30 30 50 50 50 the middle half: 50 50 50 60 60 75
    assert stats.pooled_iqm(*groups) == pytest.approx(57.5)
    assert stats.pooled_mean(*groups) == pytest.approx((75 + 40) / 2)
    many = [np.tile(groups[0], (5, 1)), np.tile(groups[1], (5, 1))]  # as the bootstrap has it
    assert stats.pooled_iqm(*many) == pytest.approx([57.5] * 5)


def test_pooled_mean_is_that_of_repetition():
    rng = np.random.default_rng(1)
    groups = [rng.normal(size=n) for n in (3, 2, 4, 6)]
    repeated = np.concatenate([np.repeat(group, 12 // len(group)) for group in groups])
    assert stats.pooled_iqm(*groups) == pytest.approx(scipy.stats.trim_mean(repeated, 0.25))


def test_interval_of_a_mean_against_the_closed_form():
    x = np.random.default_rng(3).normal(0, 1, 400)
    low, high = stats.interval([x], stats.pooled_mean)
    assert (high - low) / 2 == pytest.approx(1.96 * x.std() / 20, rel=0.06)


def test_interval_is_stratified_by_task():
    groups = [np.zeros(3), np.ones(3)]  # all the variance lies between the tasks
    assert stats.interval(groups, stats.pooled_iqm) == (0.5, 0.5)


def test_no_interval_from_fewer_than_three_seeds():
    three, two = np.arange(3.0), np.arange(2.0)
    assert stats.interval([three], stats.iqm) and not stats.interval([two], stats.iqm)
    assert not stats.interval([three, three, two], stats.pooled_iqm)


def test_intervals_of_curves_are_those_of_their_points():
    curves = np.random.default_rng(0).normal(size=(4, 3))
    low, high = stats.interval([curves], stats.iqm, axis=0)
    assert low.shape == high.shape == (3,) and (low <= stats.iqm(curves, axis=0)).all()


def test_interval_of_a_difference():
    x, y = np.random.default_rng(0).normal(size=(2, 200))
    low, high = stats.interval([x + 1, y], stats.difference(stats.pooled_mean))
    expected = 1 + x.mean() - y.mean()
    assert low < expected < high and high - low == pytest.approx(2 * 1.96 * np.sqrt(2 / 200), rel=0.15)


def test_probability_of_improvement():
    x, y = np.random.default_rng(4).normal(size=(2, 9))
    assert stats.improvement(x, y) == pytest.approx(scipy.stats.mannwhitneyu(x, y).statistic / 81)
    assert stats.improvement([1, 2], [1, 2]) == 0.5 and stats.improvement([2, 3], [0, 1]) == 1


@pytest.mark.parametrize("ties", [False, True])
def test_p_value_of_one_task_is_exact(ties):
    rng = np.random.default_rng(1)
    x, y = [(rng.integers(0, 4, n) if ties else rng.random(n)).astype(float) for n in (4, 3)]
    expected = scipy.stats.permutation_test((x, y), stats.improvement, alternative="greater", n_resamples=np.inf).pvalue
    assert stats.p_value([(x, y)]) == pytest.approx(expected)


def test_p_value_over_tasks_against_a_simulation():
    rng = np.random.default_rng(1)
    pairs = [(rng.random(n), rng.random(m)) for n, m in ((4, 3), (2, 3), (7, 8))]

    def dealt():
        for x, y in pairs:
            both = rng.permutation([*x, *y])
            yield stats.improvement(both[: len(x)], both[len(x) :])

    found = sum(stats.improvement(x, y) for x, y in pairs)
    share = np.mean([sum(dealt()) >= found - 1e-9 for _ in range(10_000)])
    assert stats.p_value(pairs) == pytest.approx(share, abs=0.016)  # three standard errors


def test_p_value_over_two_tasks_by_hand():
    clear = [100, 101], [0, 1]
    assert stats.p_value([clear, clear]) == pytest.approx(1 / 36)
    assert stats.p_value([clear, clear[::-1]]) == pytest.approx(22 / 36)  # U = 0 1 2 2 3 4 twice: 14 sums below 4
    assert stats.smallest_p([([5, 1, 3], [2, 4, 9])]) == pytest.approx(1 / 20)


def test_many_seeds_and_tasks_are_quick_and_calibrated():
    rng = np.random.default_rng(0)
    found = [stats.p_value([(rng.normal(size=n), rng.normal(size=n + 1)) for n in range(4, 10)]) for _ in range(60)]
    assert scipy.stats.kstest(found, "uniform").pvalue > 0.001


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.6, 0.6]).tolist() == [1, 1] and stats.holm([]).tolist() == []


FIVE = ([5, 6, 7, 8, 9], [0, 1, 2, 3, 4])  # p = 1 / 252
THREE = ([3, 4, 5], [0, 1, 2])  # p = 1 / 20


@pytest.mark.parametrize(
    ("questions", "said"),
    [
        ([THREE], ["holds"]),
        ([THREE[::-1]], ["does not hold"]),
        ([([3, 4, 1.5], [0, 1, 2])], ["undecided"]),
        ([([100, 101], [0, 1, 2, 3])], ["too few seeds"]),  # p = 1 / 15
        ([([100, 101], [0, 1, 2, 3, 4])], ["holds"]),  # p = 1 / 21
        ([THREE, THREE], ["undecided"] * 2),  # of two questions
        ([THREE, THREE[::-1]], ["undecided"] * 2),
        ([FIVE, THREE], ["holds", "holds"]),  # 2 / 252, then 1 / 20
        ([THREE, ([9], [1])], ["holds", "too few seeds"]),  # what nobody can decide is not asked
    ],
)
def test_verdicts(questions, said):
    found = stats.verdicts([[question] for question in questions])
    assert [row["verdict"] for row in found] == said


def test_verdicts_say_how_many_were_asked():
    first, second, few = stats.verdicts([[FIVE], [THREE], [([9], [1])]])
    assert first["asked"] == second["asked"] == few["asked"] == 2 and few["holm"] is None
    assert first["holm"] == pytest.approx(2 / 252) and second["holm"] == pytest.approx(1 / 20)
    assert first["chance"] == 1
