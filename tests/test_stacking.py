"""What cannot share a forward does not: wrong stacked losses are found out, and single ones returned instead."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_engines import IDS, closure_of, losses_of
from test_perturb import moved
from tiny import seeded, tiny_llama
from torch import Tensor, nn

from zotuner.blocks import find_blocks
from zotuner.perturb import Draw, Perturbation, Perturber

FALLS_BACK = "perturbations cannot share a forward of this model"
X = torch.linspace(-1, 1, 24).view(6, 4) ** 3


def points_of(model: nn.Module, eps: float = 0.1) -> list[Perturbation | None]:
    alphas = [eps] * len(find_blocks(model))
    return [None, *(Perturbation(Draw("gaussian", 3, 7, i), alphas) for i in (1, 2, 3))]


def expected_of(model: nn.Module, loss: Callable[[Any], Tensor], eps: float = 0.1) -> list[float]:
    twins = [model if p is None else moved(model, p.draw, list(p.alphas)) for p in points_of(model, eps)]
    return [float(loss(twin)) for twin in twins]


def stacked(loss: Callable[[Any, Tensor], Tensor], model: Any, x: Tensor = X) -> Callable[..., Tensor]:
    """A closure over per-row losses."""

    def closure(branches: int = 1) -> Tensor:
        means = loss(model, torch.cat([x] * branches)).view(branches, -1).mean(dim=1)
        return means if branches > 1 else means[0]

    return closure


def squares(model: Any, x: Tensor) -> Tensor:
    return model(x).square().sum(dim=1)


def normed(affine: bool) -> nn.Module:
    """Normalises over the batch."""
    return seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=affine), nn.Linear(4, 2)).train())


@torch.no_grad()
def test_a_model_that_mixes_rows_of_a_batch_is_evaluated_one_by_one() -> None:
    model, asked = normed(affine=False), []
    closure, points = stacked(squares, model), points_of(model)

    def noting(branches: int = 1) -> Tensor:
        asked.append(branches)
        return closure(branches=branches)

    expected = expected_of(model, lambda twin: squares(twin, X).mean())
    perturber = Perturber(model, find_blocks(model), branch_batch=4, branch_threads=1)
    losses, said = losses_of(perturber, noting, points)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert len(said) == 1
    assert said[0].startswith(FALLS_BACK + ": the same loss came out as")
    assert 4 in asked
    asked.clear()
    again, said = losses_of(perturber, noting, points)
    assert again == pytest.approx(expected, rel=1e-6)
    assert not said
    assert asked == [1] * 4


@torch.no_grad()
def test_a_module_with_weights_meets_each_branch_by_itself_even_if_it_mixes_rows() -> None:
    model = normed(affine=True)
    expected = expected_of(model, lambda twin: squares(twin, X).mean())
    perturber = Perturber(model, find_blocks(model), branch_batch=4, branch_threads=1)
    losses, said = losses_of(perturber, stacked(squares, model), points_of(model))
    assert losses == pytest.approx(expected, rel=1e-6)
    assert not said


@torch.no_grad()
def test_a_closure_that_mixes_branches_up_is_found_out() -> None:
    model = seeded(lambda: nn.Linear(4, 2))
    right = stacked(squares, model)
    wrong = lambda branches=1: right(branches=branches).flip(0) if branches > 1 else right()  # noqa: E731
    losses, said = losses_of(
        Perturber(model, find_blocks(model), branch_batch=4, branch_threads=1), wrong, points_of(model)
    )
    assert losses == pytest.approx(expected_of(model, lambda twin: squares(twin, X).mean()), rel=1e-6)
    assert [text.startswith(FALLS_BACK) for text in said] == [True]


@torch.no_grad()
def test_a_first_loss_that_is_not_finite_does_not_vouch_for_stacking() -> None:
    model = normed(affine=False)
    points, perturber = points_of(model), Perturber(model, find_blocks(model), branch_batch=4, branch_threads=1)
    broken, said = losses_of(perturber, stacked(squares, model, X * math.nan), points)
    assert all(math.isnan(loss) for loss in broken)
    assert not said
    losses, said = losses_of(perturber, stacked(squares, model), points)
    assert losses == pytest.approx(expected_of(model, lambda twin: squares(twin, X).mean()), rel=1e-6)
    assert len(said) == 1


@torch.no_grad()
def test_an_error_that_only_stacking_makes_is_no_end() -> None:
    model = seeded(lambda: nn.Linear(4, 2))

    def of_six_rows(module: Any, x: Tensor) -> Tensor:
        return module(x).square().sum(dim=1) * torch.ones(6)

    perturber = Perturber(model, find_blocks(model), branch_batch=4, branch_threads=1)
    losses, said = losses_of(perturber, stacked(of_six_rows, model), points_of(model))
    assert losses == pytest.approx(expected_of(model, lambda twin: squares(twin, X).mean()), rel=1e-6)
    assert len(said) == 1
    assert "The size of tensor a" in said[0]


@torch.no_grad()
def test_an_error_of_single_losses_too_is_raised_and_stacking_tried_again() -> None:
    model, asked = seeded(lambda: nn.Linear(4, 2)), []
    right, perturber = stacked(squares, model), Perturber(model, find_blocks(model), branch_batch=4, branch_threads=1)
    perturber.losses(right, points_of(model)[1:2])  # the watch is over

    def busy(branches: int = 1) -> Tensor:
        raise RuntimeError("busy")

    def noting(branches: int = 1) -> Tensor:
        asked.append(branches)
        return right(branches=branches)

    with pytest.raises(RuntimeError, match="busy"):
        perturber.losses(busy, points_of(model))
    _, said = losses_of(perturber, noting, points_of(model))
    assert max(asked) == 4
    assert not said


@torch.no_grad()
def test_a_stacked_result_of_another_shape_is_refused() -> None:
    model = seeded(lambda: nn.Linear(4, 2))
    perturber = Perturber(model, find_blocks(model), branch_batch=4, branch_threads=1)
    with pytest.raises(ValueError, match=r"branches=4 must return losses of shape \(4,\)"):
        perturber.losses(lambda branches=1: squares(model, torch.cat([X] * branches)).mean(), points_of(model))


class Places(nn.Module):
    """A language model that looks its positions up as (length,), for all texts at once."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(64, 8), nn.Embedding(12, 8), nn.Linear(8, 64)

    def forward(self, input_ids: Tensor) -> Any:
        hidden = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))

        class Output:
            logits = self.head(hidden)

        return Output


@pytest.mark.parametrize("eps", [0.1, 1e-5])  # the second changes too little for a comparison of losses to tell
@pytest.mark.parametrize(("rows", "size"), [(1, 2), (2, 2), (3, 2), (1, 4), (2, 4)])  # 12 places: a multiple of most
@torch.no_grad()
def test_positions_shared_by_all_texts_are_not_taken_for_a_batch(rows: int, size: int, eps: float) -> None:
    model: Any = seeded(Places)
    perturber = Perturber(model, find_blocks(model), branch_batch=size)
    losses, said = losses_of(perturber, closure_of(model, (IDS[:rows],)), points_of(model, eps))
    expected = expected_of(model, lambda twin: closure_of(twin, (IDS[:rows],))(), eps)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert len(said) == 1
    assert said[0].startswith(FALLS_BACK)


class Held(nn.Module):
    """Returns its parameter."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.held = nn.Parameter(torch.randn(shape))

    def forward(self) -> Tensor:
        return self.held


class Sharing(nn.Module):
    """Uses what a module without inputs returns: entries to attend to, as many as one likes, or a factor."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(4, 4), Held(*shape)

    def forward(self, x: Tensor) -> Tensor:
        hidden, shared = self.first(x), self.shared()
        return (hidden @ shared.T).softmax(dim=-1) @ shared if shared.ndim == 2 else hidden * shared


@pytest.mark.parametrize("shape", [(6, 4), (4,), (1,), ()], ids=str)
@pytest.mark.parametrize("eps", [0.1, 1e-5])
@torch.no_grad()
def test_an_output_that_all_texts_share_is_not_taken_for_a_batch(shape: tuple[int, ...], eps: float) -> None:
    model = seeded(lambda: Sharing(*shape))
    x = X[:2]  # 2 branches of 2 rows are 4 rows, as many as there are columns
    perturber = Perturber(model, find_blocks(model), branch_batch=2)
    losses, said = losses_of(perturber, stacked(squares, model, x), points_of(model, eps))
    assert losses == pytest.approx(expected_of(model, lambda twin: squares(twin, x).mean(), eps), rel=1e-6)
    assert [text.startswith(FALLS_BACK) for text in said] == [True]


@torch.no_grad()
def test_an_output_with_a_dimension_of_1_for_the_batch_is_repeated() -> None:
    model = seeded(lambda: Sharing(1, 4))
    model.forward = lambda x: model.first(x) * model.shared()
    expected = expected_of(model, lambda twin: (twin.first(X) * twin.shared()).square().sum(dim=1).mean())
    losses, said = losses_of(
        Perturber(model, find_blocks(model), branch_batch=4, branch_threads=1),
        stacked(squares, model),
        points_of(model),
    )
    assert losses == pytest.approx(expected, rel=1e-6)
    assert not said


@torch.no_grad()
def test_batches_that_a_part_of_the_model_meets_are_not_mistaken_for_each_other() -> None:
    model: Any = tiny_llama(initializer_range=0.3)
    batches = IDS, torch.cat([IDS, IDS]).flip(1)  # of 3 rows and of 6: one is a multiple of the other

    def loss(of: Any, branches: int = 1) -> Tensor:
        hidden = [of.model(input_ids=ids.repeat(branches, 1)).last_hidden_state for ids in batches]
        return sum(of.lm_head(h).square().mean(dim=(1, 2)).view(branches, -1).mean(dim=1) for h in hidden)

    perturber = Perturber(model, find_blocks(model), branch_batch=2)
    losses, _ = losses_of(perturber, lambda branches=1: loss(model, branches).squeeze(), points_of(model))
    assert losses == pytest.approx(expected_of(model, loss), rel=1e-6)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("wrong", [-1, 12])
@torch.no_grad()
def test_an_index_beyond_an_embeddings_table_raises(wrong: int, rank: int) -> None:
    table = nn.Embedding(12, 4)
    for ids in (torch.tensor([[3, wrong]]), torch.tensor([[3, 4]])):
        closure = lambda ids=ids: table(ids).sum()  # noqa: E731
        perturber = Perturber(table, find_blocks(table))
        if wrong in ids:
            with pytest.raises(IndexError, match="index out of range"):
                perturber.loss(closure, Draw("rademacher", 0, 0, rank=rank), [0.1])
        else:
            perturber.loss(closure, Draw("rademacher", 0, 0, rank=rank), [0.1])
