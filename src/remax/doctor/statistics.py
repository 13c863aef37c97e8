"""Intervals of what checks measure."""

import math

Z_95 = 1.959963984540054


def correlation_interval(found: float, number: int) -> tuple[float, float]:
    """Returns the 95% confidence interval of Pearson's correlation, by Fisher's transformation.

    -1 to 1 for fewer than 4 values, which tell nothing.
    """
    if number < 4:
        return -1.0, 1.0
    centre = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, found)))
    spread = Z_95 / math.sqrt(number - 3)
    return math.tanh(centre - spread), math.tanh(centre + spread)


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Returns a mean and its 95% interval by the normal approximation."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    spread = Z_95 * math.sqrt(variance / len(values))
    return mean, mean - spread, mean + spread
