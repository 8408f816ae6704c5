"""First-order trajectories: resets, tasks and batches in an order of their own, records that are visited again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_meta import Net, loss_of
from torch import nn

from zotuner.errors import ZotunerError
from zotuner.tasks import Example
from zotuner.trajectory import Recorded, Walk, first_order, step_if_finite

EXAMPLES = tuple(Example(str(i), ("a", "b"), 0) for i in range(20))


def walk(model: nn.Module, folder: Path, **options: Any) -> Walk:
    settings: dict[str, Any] = {"optimizer": "adam", "lr": 0.01, "reset_every": 3, "batch_size": 4, "seed": 1}
    return Walk(model, lambda *_: loss_of(model), {"t": EXAMPLES, "u": EXAMPLES}, folder, **settings | options)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_reset_brings_the_starting_weights_and_a_fresh_optimizer(tmp_path: Path, optimizer: str) -> None:
    model = Net()
    seen = []
    for point in walk(model, tmp_path / "t", optimizer=optimizer).points(7):
        seen.append((point.position, torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])))
    assert [position for position, _ in seen] == [0, 1, 2, 0, 1, 2, 0]
    assert torch.equal(seen[0][1], seen[3][1])
    assert torch.equal(seen[1][1], seen[4][1])  # the loss is the same one: a fresh optimizer repeats its steps
    assert not torch.equal(seen[0][1], seen[1][1])


def test_each_round_visits_every_task_in_an_order_of_its_own(tmp_path: Path) -> None:
    tasks = [point.task for point in walk(Net(), tmp_path / "t").points(40)]
    rounds = [tuple(tasks[i : i + 2]) for i in range(0, 40, 2)]
    assert set(rounds) == {("t", "u"), ("u", "t")}


def test_batches_follow_from_the_seed(tmp_path: Path) -> None:
    one, same, other = ([p.examples for p in walk(Net(), tmp_path, seed=seed).points(4)] for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_a_loss_that_is_not_finite_moves_nothing(tmp_path: Path) -> None:
    model, asked = Net(), []

    def loss(*_: Any) -> torch.Tensor:
        asked.append(1)
        return loss_of(model) * (float("nan") if len(asked) == 2 else 1.0)

    points = Walk(
        model, loss, {"t": EXAMPLES}, tmp_path / "t", optimizer="adam", lr=0.01, reset_every=9, batch_size=4, seed=1
    ).points(4)
    weights = [torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()]) for _ in points]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert bool(torch.isfinite(weights[3]).all())


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_is_taken_only_where_loss_and_gradients_are_finite(bad: str) -> None:
    model = Net()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = first_order("sgd", model, 0.1)
    loss_of(model).backward()
    if bad == "gradient":
        next(model.parameters()).grad[0] = float("inf")  # type: ignore[index]
    assert not step_if_finite(optimizer, float("nan") if bad == "loss" else 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    loss_of(model).backward()
    assert step_if_finite(optimizer, 1.0)
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_record_knows_where_a_round_begins_whether_or_not_its_first_point_was_kept(tmp_path: Path) -> None:
    list(walk(Net(), tmp_path, snapshot_every=2, reset_every=5).points(9))  # positions 0, 2, 4, 1, 3
    visited = Recorded(Net(), {"t": EXAMPLES, "u": EXAMPLES}, tmp_path).points(7)
    assert [(p.position, p.begins) for p in visited] == [
        *((0, True), (2, False), (4, False), (1, True), (3, False), (0, True), (2, False))
    ]


def test_a_second_batch_shares_no_example_with_the_first(tmp_path: Path) -> None:
    model = Net()
    for point in walk(model, tmp_path).points(6):
        assert len(point.others) == len(point.examples) == 4
        assert not set(point.others) & set(point.examples)


def test_a_recorded_trajectory_is_visited_at_the_same_points(tmp_path: Path) -> None:
    model = Net()
    walked = [
        (
            point.position,
            point.task,
            point.examples,
            torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()]),
        )
        for point in walk(model, tmp_path / "t", snapshot_every=2).points(5)
    ]
    rows = [json.loads(line) for line in (tmp_path / "t" / "points.jsonl").read_text().splitlines()]
    assert [row["number"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(isinstance(row["loss"], float) for row in rows)
    visited = Recorded(model, {"t": EXAMPLES, "u": EXAMPLES}, tmp_path / "t").points(4)
    for (position, task, examples, weights), point in zip([*walked[::2], walked[0]], visited, strict=True):
        assert (position, task, examples) == (point.position, point.task, point.examples)
        assert torch.equal(weights, torch.cat([p.detach().reshape(-1) for p in model.parameters()]))


def test_a_record_without_weights_is_refused(tmp_path: Path) -> None:
    list(walk(Net(), tmp_path / "t").points(2))
    with pytest.raises(ZotunerError, match="--snapshot-every"):
        Recorded(Net(), {"t": EXAMPLES, "u": EXAMPLES}, tmp_path / "t")


def test_a_record_whose_weights_went_missing_names_the_file(tmp_path: Path) -> None:
    list(walk(Net(), tmp_path / "t", snapshot_every=1).points(2))
    (tmp_path / "t" / "point-000001.safetensors").unlink()
    with pytest.raises(ZotunerError, match=r"point-000001\.safetensors"):
        Recorded(Net(), {"t": EXAMPLES, "u": EXAMPLES}, tmp_path / "t")
