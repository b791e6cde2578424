"""The smallest effect that a test can detect, for results that are not beyond chance.

power.answers(questions=60, tests=100)   # 20 points or more; 24 are found in 4 of 5 studies
power.answers(questions=8, tests=25)     # None: no change of 8 answers is beyond chance
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import scipy.optimize
import scipy.stats

LEVEL = 0.05  # of tests, after their correction
POWER = 0.8  # the share of studies in which the likely effect is found


class Detectable(NamedTuple):
    """Effects as shares of the answers, such as 0.2 for 20 points of accuracy.

    Attributes:
      possible: The smallest effect that can be found; None if no effect can.
      likely: The smallest effect that is found in `POWER` of such studies; None if no effect can.
    """

    possible: float | None
    likely: float | None


def changed_answers(tests: int, *, level: float = LEVEL) -> int:
    """Return the number of answers that must change, all in one direction, to be beyond chance.

    This is the most favourable case: with changes in both directions more are needed.

    Args:
      tests: The number of tests in the family, which are corrected by `intervals.holm`.
      level: The level of the family.
    """
    if tests < 1 or not 0 < level < 1:
        raise ValueError(f"tests={tests} must be 1 or more, and level={level} in (0, 1)")
    return next(m for m in itertools.count(1) if tests * 2.0 ** (1 - m) <= level)


def answers(
    questions: int, tests: int, *, level: float = LEVEL, power: float = POWER
) -> Detectable:
    """Return the changes of accuracy that `intervals.sign_flip` finds, corrected for its family.

    Each answer changes with the same probability, and in one direction only.

    Args:
      questions: The number of questions, each answered right or wrong.
      tests: The number of tests in the family.
      level: The level of the family.
      power: The share of studies in which the likely effect is found.
    """
    needed = changed_answers(tests, level=level)
    if needed > questions:
        return Detectable(None, None)
    # The probability of `needed` changes or more is a beta distribution of their share.
    likely = scipy.stats.beta.ppf(power, needed, questions - needed + 1)
    return Detectable(needed / questions, float(likely))


def difference(
    error: float, degrees: float, tests: int, *, level: float = LEVEL, power: float = POWER
) -> Detectable:
    """Return the differences that a t test such as `intervals.effect` finds.

    Args:
      error: The standard error of the difference.
      degrees: Its degrees of freedom.
      tests: The number of tests in the family.
      level: The level of the family.
      power: The share of studies in which the likely effect is found.
    """
    bound = float(scipy.stats.t.isf(level / (2 * tests), degrees))

    def lacks(noncentrality: float) -> float:
        return float(scipy.stats.nct.sf(bound, degrees, noncentrality)) - power

    high = bound + 1.0
    while lacks(high) < 0:
        high *= 2
    return Detectable(bound * error, float(scipy.optimize.brentq(lacks, 0, high)) * error)
