"""From what was measured to the figures of each row."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from zotuner.bench.measure import Times
from zotuner.bench.rows import Row


def summarize(
    rows: Sequence[Row],
    tokens: int,
    times: dict[str, Times],
    parts: dict[str, dict[str, float]],
    peaks: dict[str, tuple[int, int] | None],
) -> dict[str, dict[str, Any]]:
    """Name -> figures; every row has every key, None where the figure does not exist.

    Ratios are taken round by round, then their median, so that a slow spell of the machine falls on both sides.

    Args:
        rows: What was measured.
        tokens: Of a batch.
        times: From `time_rounds`.
        parts: From `shares`, of the rows that have any.
        peaks: From `memory`.
    """
    out: dict[str, dict[str, Any]] = {}
    for row in rows:
        own = times[row.name]
        seconds = median(own.steps)
        official = times.get(row.official or "")
        base = times.get(row.base or "")
        peak, alone = peaks[row.name] or (None, None)
        out[row.name] = {
            "seconds": seconds,
            "forwards": row.forwards,
            "per_own_forwards": _ratio(own.steps, [row.forwards * f for f in own.forwards]),
            "per_official_step": official and _ratio(own.steps, official.steps),
            "official_step_per_step": official and _ratio(official.steps, own.steps),
            "per_base_step": base and _ratio(own.steps, base.steps),
            "tokens_per_second": tokens * row.forwards / seconds,
            "peak_bytes": peak,
            "forward_peak_bytes": alone,
            "peak_per_forward": None if peak is None or alone is None else peak / alone,
            "shares": parts.get(row.name),
            "rounds": {"seconds": own.steps, "forward_seconds": own.forwards},
        }
    return out


def _ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratios of the rounds."""
    return median(a / b for a, b in zip(over, under, strict=True))
