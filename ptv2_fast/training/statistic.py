"""Mean and standard deviation over seeds."""

import dataclasses
import math
import statistics
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation.

    Attributes:
        mean: of the values.
        deviation: divides by count - 1; None for one value, or when a value is not finite.
        count: of the values.
    """

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Statistic | None":
        """None without values."""
        if not values:
            return None
        known = len(values) > 1 and all(map(math.isfinite, values))
        deviation = statistics.stdev(values) if known else None
        return cls(statistics.fmean(values), deviation, len(values))
