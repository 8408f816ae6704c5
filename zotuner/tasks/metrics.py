"""Metrics by the names under which a task's file asks for them."""

from zotuner.tasks.generated import Best, squad_em, squad_f1
from zotuner.tasks.scores import Mean, Metric, macro_f1, positive_f1, right

METRICS: dict[str, Metric] = {
    "accuracy": Mean(right),
    "macro_f1": macro_f1,
    "positive_f1": positive_f1,
    "f1": Mean(Best(squad_f1)),
    "em": Mean(Best(squad_em)),
}
