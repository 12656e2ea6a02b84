"""What a spike is: a number far above what it has been, in robust deviations. Pure functions."""

from collections.abc import Sequence
from statistics import median

NORMAL = 1.4826  # median absolute deviation -> standard deviation of a normal distribution: 1 / Phi^-1(3/4)
FLOOR = 1e-3  # a deviation is at least this share of the median: a window of equal numbers makes no spike of a rounding


def deviations(value: float, window: Sequence[float]) -> float:
    """How many robust deviations `value` is above the window's median; negative below it.

    (value - median) / max(1.4826 * MAD, 0.001 * |median|), after Iglewicz and Hoaglin, How to Detect and Handle
    Outliers, 1993. Unlike mean and standard deviation both are unmoved by spikes in the window itself.
    """
    middle = median(window)
    spread = NORMAL * median(abs(other - middle) for other in window)
    return (value - middle) / max(spread, FLOOR * abs(middle), 1e-30)
