"""Meta-training: its gradient is autograd's, its tuner learns."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from zotuner import noise
from zotuner.blocks import find_blocks, moments
from zotuner.config import MetaTrainConfig
from zotuner.errors import ZotunerError
from zotuner.expected import MEMORY, Expected, Profile, Profiles, Remembered, gain, minus_log_gain, profile
from zotuner.gradients import block_dots
from zotuner.meta import MetaTrainer
from zotuner.pertnn import FeatureSpec, normalize
from zotuner.perturb import Draw, Perturber
from zotuner.sampled import virtual_step
from zotuner.tasks import Example
from zotuner.trajectory import Point
from zotuner.tuner import Tuner
from zotuner.visit import Loss, Visit

LR, EPS = 0.05, 1e-3


class Net(nn.Module):
    """A small network in float64 with tied weights and a bias."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(9, 6)
            self.mid = nn.Linear(6, 6)
            self.norm = nn.LayerNorm(6)
            self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.mid(self.embed(ids)))))


X, Y = torch.tensor([0, 3, 5, 8, 2]), torch.tensor([1, 4, 4, 0, 7])


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(X), Y)


def config(**options: Any) -> MetaTrainConfig:
    stated = {"model": "m", "out": Path("o"), "eps": EPS, "inner_lr": LR, "noise": "gaussian", "seed": 4}
    return MetaTrainConfig(**stated | options)


def never() -> Tensor:
    raise AssertionError("a second batch was asked for")


def visit(
    trainer: MetaTrainer, loss: Loss, *, other: Loss = never, centred: Loss | None = None, **options: Any
) -> dict[str, Any]:
    batch = (Example("a", ("b", "c"), 0),) * 4
    begins = options.get("position", 0) == 0
    point = Point(
        **{"number": 0, "position": 0, "begins": begins, "task": "t", "examples": batch, "others": batch} | options
    )
    return trainer.update(Visit(point, loss, other, centred))


def trained_bank(tuner: Tuner) -> None:
    """Moves "exp" nets off their start, where every scale is 1."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        tuner.bank.w2 += 0.3 * torch.randn(tuner.bank.w2.shape, generator=random)


@pytest.mark.parametrize("architecture", ["abs", "exp"])
@pytest.mark.parametrize("normalized", [True, False])
def test_the_block_dot_meta_gradient_is_autograds(architecture: Any, normalized: bool) -> None:
    model = Net()
    tuner = Tuner.for_model(model, architecture, seed=2)
    trained_bank(tuner)
    tuner.bank.double()
    settings = config(architecture=architecture, normalized=normalized, outer_lr=1.0)
    trainer = MetaTrainer(model, tuner, settings)
    trainer._outer = torch.optim.SGD(trainer._bank.parameters(), lr=1.0)  # the step is the gradient itself
    before = {name: p.detach().clone() for name, p in tuner.bank.named_parameters()}
    expected = whole_graph_gradient(model, tuner, settings)
    row = visit(trainer, lambda: loss_of(model), number=6)
    assert not row["skipped"]
    for name, p in tuner.bank.named_parameters():
        torch.testing.assert_close(before[name] - p.detach(), expected[name], rtol=1e-6, atol=1e-10)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-4


def whole_graph_gradient(model: Net, tuner: Tuner, settings: MetaTrainConfig) -> dict[str, Tensor]:
    """d L(theta - lr c u(omega)) / d omega through one graph over all parameters, c and z held fixed."""
    blocks = find_blocks(model)
    features = torch.tensor([(0.0, 0.0, 1.0, *moments(block)) for block in blocks])
    raw = tuner.bank(tuner.spec(features))
    numels = torch.tensor([block.numel for block in blocks])
    sigma = normalize(raw, numels) if settings.normalized else raw.double()
    start = {name: p.detach() for name, p in model.named_parameters()}
    z = {
        block.name: noise.sample("gaussian", seed=4, step=6, block=i, branch=0, start=0, stop=block.numel)
        .double()
        .view(start[block.name].shape)
        for i, block in enumerate(blocks)
    }

    def at(factor: float) -> Tensor:
        moved = {block.name: start[block.name] + factor * sigma[i] * z[block.name] for i, block in enumerate(blocks)}
        moved["head.weight"] = moved["embed.weight"]
        return nn.functional.cross_entropy(functional_call(model, moved, (X,)), Y)

    with torch.no_grad():
        c = float(at(EPS) - at(-EPS)) / (2 * EPS)
    total = at(-LR * c)
    names = [name for name, _ in tuner.bank.named_parameters()]
    return dict(zip(names, torch.autograd.grad(total, list(tuner.bank.parameters())), strict=True))


def test_a_virtual_step_brings_the_weights_back_and_keeps_no_gradient() -> None:
    model = Net()
    blocks = find_blocks(model)
    before = [p.detach().clone() for p in model.parameters()]
    step = virtual_step(
        Perturber(model, blocks),
        blocks,
        lambda: loss_of(model),
        Draw("gaussian", 0, 0),
        torch.ones(len(blocks)),
        eps=EPS,
        lr=LR,
    )
    assert step.finite
    assert step.meta_loss < sum(step.losses) / 2
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=0, atol=1e-14)
        assert p.grad is None


def test_gradients_are_freed_as_the_backward_goes() -> None:
    model = Net()
    held: list[int] = []
    blocks = find_blocks(model)
    dots = torch.zeros(len(blocks), dtype=torch.float64)
    with block_dots(blocks, Draw("gaussian", 0, 0), dots):
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(
                lambda _: held.append(sum(q.grad is not None for q in model.parameters()))
            )
        loss_of(model).backward()
    assert held == [0] * len(list(model.parameters()))
    assert bool((dots != 0).all())


@pytest.mark.parametrize("meta_loss", ["sampled", "expected"])
def test_a_meta_loss_that_is_not_finite_changes_no_net(meta_loss: str) -> None:
    model = Net()
    tuner = Tuner.for_model(model, "abs")
    before = [p.detach().clone() for p in tuner.bank.parameters()]
    trainer = MetaTrainer(model, tuner, config(meta_loss=meta_loss))
    row = visit(trainer, lambda: loss_of(model) * float("nan"))
    assert row["skipped"]
    assert all(torch.equal(a, b) for a, b in zip(before, tuner.bank.parameters(), strict=True))


def test_nets_that_are_not_finite_end_the_run_with_what_to_do() -> None:
    model = Net()
    trainer = MetaTrainer(model, Tuner.for_model(model, "abs"), config())
    with torch.no_grad():
        trainer._bank.w1[0, 0, 0] = float("nan")
    with pytest.raises(ZotunerError, match=r"step 1: .* smaller --outer-lr than 0\.001"):
        visit(trainer, partial(loss_of, model))


class Split(nn.Module):
    """Block a carries the gradient, block b only curvature, 20 an element; float64."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(8).double()), nn.Parameter(torch.zeros(8).double())

    def forward(self, slope: float = 1.0) -> Tensor:
        return slope * self.a.sum() + 10.0 * (self.b**2).sum()

    def wavering(self, sign: float) -> Tensor:
        """The gradient of b comes and goes, so that nothing of it lasts."""
        return self.a.sum() + sign * self.b.sum()


@pytest.mark.filterwarnings("ignore:.*read outside")
@pytest.mark.parametrize("meta_loss", ["sampled", "expected"])
def test_meta_training_finds_the_block_that_pays(meta_loss: str) -> None:
    """The scale moves from b to a."""
    model = Split()
    tuner = Tuner.for_model(model, "exp")
    trainer = MetaTrainer(model, tuner, config(outer_lr=1e-2, meta_loss=meta_loss))
    rows = []
    for number in range(40):
        closure = partial(model.wavering, (1, 1, -1, -1)[number % 4]) if meta_loss == "expected" else model
        if number == 20:
            trainer.end_round(number)
        rows.append(visit(trainer, closure, number=number, position=number % 20))
    sigma = trainer.scales("t").detach()
    assert float(sigma[0]) > 1.15
    assert float(sigma[1]) < 0.85
    assert rows[-1]["meta_loss"] < rows[-1]["loss"]
    assert meta_loss == "sampled" or rows[1]["gain"] == pytest.approx(1.0)
    assert meta_loss == "sampled" or rows[-1]["gain"] > 1.5
    assert rows[-1]["sigma_types"] == pytest.approx({"a": float(sigma[0]), "b": float(sigma[1])}, rel=0.1)


def test_at_the_end_of_a_round_the_nets_learn_of_all_points_from_where_they_began() -> None:
    model = Split()
    tuner = Tuner.for_model(model, "exp")
    trainer = MetaTrainer(model, tuner, config(meta_loss="expected"))
    fresh = trainer.nets()
    for number in range(8):
        visit(trainer, partial(model.wavering, (1, 1, -1, -1)[number % 4]), number=number, position=number)
        assert all(torch.equal(tensor, fresh[name]) for name, tensor in trainer.nets().items())
    trainer.end_round(8)
    learned = trainer.nets()
    assert not all(torch.equal(tensor, fresh[name]) for name, tensor in learned.items())
    trained_bank(tuner)
    trainer.end_round(8)
    assert all(torch.equal(tensor, learned[name]) for name, tensor in trainer.nets().items())


class Deep(nn.Module):
    """Four layers of two parameters, and one outside."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Parameter(torch.full((3,), 0.1))
        self.layers = nn.ModuleList(nn.ParameterDict({k: torch.full((n,), 0.1) for k, n in SIZES}) for n in range(4))

    def forward(self, sign: float) -> Tensor:
        """The gradient of each layer's `q` lasts, that of all else comes and goes."""
        return sum((x["q"].sum() + sign * x["v"].sum() for x in self.layers), sign * self.out.sum())


SIZES = (("q", 5), ("v", 6))


@pytest.mark.filterwarnings("ignore:.*read outside")
@pytest.mark.parametrize("meta_loss", ["sampled", "expected"])
def test_blocks_of_one_type_in_one_band_learn_one_net_together(meta_loss: Any) -> None:
    model = Deep()
    tuner = Tuner.for_model(model, "exp", seed=5)
    trainer = MetaTrainer(model, tuner, config(outer_lr=1e-2, bands=2, meta_loss=meta_loss))
    for number in range(12):
        visit(trainer, partial(model, (1, 1, -1, -1)[number % 4]), number=number, position=number)
    trainer.end_round(12)
    groups: dict[tuple[float, ...], list[str]] = {}
    for name, weights in zip(tuner.block_names, tuner.bank.w2.detach(), strict=True):
        groups.setdefault(tuple(weights.tolist()), []).append(name)
    pairs = [[f"layers.{low}.{kind}", f"layers.{low + 1}.{kind}"] for low in (0, 2) for kind in "qv"]
    assert sorted(groups.values()) == sorted([["out"], *pairs])
    again = MetaTrainer(model, Tuner.for_model(model, "exp", seed=5), config(bands=2, meta_loss=meta_loss))
    again.restore(*trainer.state())
    assert all(torch.equal(tensor, trainer.nets()[name]) for name, tensor in again.nets().items())
    assert torch.equal(again._tuner.bank.w1, tuner.bank.w1)


def test_a_profile_holds_energy_signal_and_curvature_of_each_block() -> None:
    model = Split()
    blocks = find_blocks(model)
    remembered = Remembered()
    first = profile(blocks, model, partial(model, 2.0), remembered, examples=4)
    assert first.finite
    assert first.signal is None
    found = profile(blocks, model, partial(model, -3.0), remembered, examples=4)
    assert found.finite
    assert found.signal is not None
    assert found.energy.tolist() == pytest.approx([8.0, 0.0])
    assert found.signal.tolist() == pytest.approx([-48.0, 0.0])
    assert found.curvature.tolist() == pytest.approx([4 * 8.0 + 3 * 48.0, 0.0])
    assert all(p.grad is None for p in model.parameters())
    mean = (2.0 * MEMORY - 3.0) / (MEMORY + 1)
    alone = profile(blocks, model, None, remembered, examples=4)
    assert alone.signal is not None
    assert alone.signal.tolist() == pytest.approx([8 * mean, 0.0])


def test_curvature_is_the_mean_squared_gradient_of_an_example() -> None:
    """Batches of 3 from 2,000 examples; energy and signal are those of batches, curvature that of examples."""
    random = torch.Generator().manual_seed(0)
    gradients = torch.randn(2000, 3, 4, generator=random, dtype=torch.float64) + torch.tensor([1.0, 0.5, 0.0, -2.0])
    batches = gradients.mean(dim=1)
    energy = batches.square().mean(dim=0)
    signal = (batches[1:] * batches[:-1]).mean(dim=0)
    curvature = Profile(1.0, signal, energy, 3).curvature
    assert curvature.tolist() == pytest.approx(gradients.square().mean(dim=(0, 1)).tolist(), rel=0.1)


def test_curvature_is_never_less_than_the_energy() -> None:
    energy = torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert Profile(1.0, torch.tensor([1.3, 0.5], dtype=torch.float64), energy, 4).curvature.tolist() == [1.0, 2.5]


def test_the_expected_meta_losss_gradient_is_that_of_the_gain() -> None:
    random = torch.Generator().manual_seed(3)
    point = Profile(1.0, *torch.rand(2, 5, generator=random, dtype=torch.float64), 4)
    scales = (torch.rand(5, generator=random, dtype=torch.float64) + 0.5).requires_grad_()
    profiles = Profiles()
    own = profiles.add(point)
    assert torch.equal(own, profiles.means)
    assert point.signal is not None
    a, t, b = (x @ scales**2 for x in (point.signal, point.energy, point.curvature))
    logarithm = torch.log(t) + torch.log(b) - 2 * torch.log(a)
    (wanted,) = torch.autograd.grad(logarithm, scales)
    found = minus_log_gain(own.expand(2, -1, -1), own.expand(2, -1, -1), scales.expand(2, -1))
    assert found is not None
    torch.testing.assert_close(torch.autograd.grad(found, scales)[0], wanted)
    assert gain(own, scales) == pytest.approx(float((a**2 / (2 * t * b)).detach()))


def test_profiles_are_means_of_points_relative_to_their_energy() -> None:
    profiles, ones = Profiles(), torch.ones(1, dtype=torch.float64)
    owns = [profiles.add(Profile(1.0, s * ones, t * ones, 4)) for s, t in ((0.5, 2.0), (-0.5, 2.0), (5.0, 20.0))]
    assert owns[2][:, 0].tolist() == pytest.approx([0.25, 1.0, 4 - 0.75])
    torch.testing.assert_close(profiles.means, torch.stack(owns).mean(dim=0))


def test_points_of_negative_signal_teach_nothing_yet() -> None:
    ones = torch.ones(3, dtype=torch.float64)
    bad, good = Profiles().add(Profile(1.0, -ones, ones, 4)), Profiles().add(Profile(1.0, ones / 2, ones, 4))
    scales = ones[None].clone().requires_grad_()
    assert minus_log_gain(bad[None], bad[None], scales) is None
    assert math.isnan(gain(bad, ones))
    both = torch.stack([bad, good])
    mixed, alone = minus_log_gain(both, both, scales.expand(2, -1)), minus_log_gain(good[None], good[None], scales)
    assert mixed is not None
    assert alone is not None
    torch.testing.assert_close(mixed, alone)


def test_each_task_has_profiles_of_its_own_before_and_after_it_has_settled() -> None:
    model = Split()
    trainer = MetaTrainer(model, Tuner.for_model(model, "exp"), config(meta_loss="expected", settle=2))
    for position, task in ((0, "one"), (1, "one"), (2, "one"), (3, "one"), (4, "two"), (5, "two"), (6, "one")):
        visit(trainer, model, number=position, position=position, task=task)
    expected = trainer._meta_loss
    assert isinstance(expected, Expected)
    counts = {phase: profiles.count for phase, profiles in expected._profiles.items()}
    assert counts == {"one settling": 1, "one settled": 2, "two settled": 1}
    assert [point.phase for point in expected._visited] == ["one settling", "one settled", "two settled", "one settled"]


@pytest.mark.filterwarnings("ignore:.*read outside")
def test_a_point_left_out_of_the_gain_leaves_no_nan_in_its_gradient() -> None:
    ones = torch.ones(1, dtype=torch.float64)
    good, flat = Profiles().add(Profile(1.0, ones / 2, ones, 4)), torch.zeros(3, 1, dtype=torch.float64)
    scales, alone = (ones.clone().requires_grad_() for _ in range(2))
    both = torch.stack([good, flat])
    for found, by in (
        (minus_log_gain(both, both, torch.stack([scales, scales])), scales),
        (minus_log_gain(good[None], good[None], alone[None]), alone),
    ):
        assert found is not None
        found.backward()
        assert by.grad is not None
    torch.testing.assert_close(scales.grad, alone.grad)


def test_a_visit_of_a_few_points_of_a_record_knows_its_rounds_and_phases() -> None:
    """Positions 0 and `settle` need not be among them."""
    model = Split()
    trainer = MetaTrainer(model, Tuner.for_model(model, "exp"), config(meta_loss="expected", settle=5))
    known = []
    for number, position in enumerate((1, 4, 7, 10, 2, 5)):
        begins = number in (0, 4)
        row = visit(trainer, model, number=number, position=position, begins=begins, centred=partial(model, 2.0))
        known.append(math.isfinite(row["gain"]))
    assert known == [False, True, False, True, False, False]


def test_what_has_no_gradient_is_remembered_as_none_and_is_kept_so() -> None:
    model = Split()
    model.unused = nn.Parameter(torch.ones(3))
    blocks = find_blocks(model, "block")

    def made() -> Expected:
        return Expected(blocks, config(meta_loss="expected"))

    expected, sigma = made(), torch.ones(3)
    for number in range(2):  # a gradient of b at the first alone: the mean of it fades
        loss = partial(model.wavering, 1.0) if number == 0 else model.a.sum
        batch = (Example("a", ("b", "c"), 0),) * 4
        point = Point(number, number, number == 0, "t", batch, batch)
        expected.visit(Visit(point, loss, never, None), torch.zeros(3, 5), sigma)
    again = made()
    again.restore(*expected.state())
    (remembered,) = again._remembered.values()
    assert [float(tensor[0]) for tensor in remembered.means.values()] == pytest.approx(
        [1 - MEMORY**2, (1 - MEMORY) * MEMORY]
    )


def test_outer_steps_and_their_points_follow_from_the_configuration() -> None:
    model = Split()

    def objectives(**options: Any) -> list[float]:
        trainer = MetaTrainer(model, Tuner.for_model(model, "exp"), config(meta_loss="expected", **options))
        for number in range(6):
            visit(trainer, partial(model, 1.0 + number), number=number, position=number)
        random = torch.Generator().manual_seed(0)
        spread = torch.rand(8, 2, generator=random, dtype=torch.float64) + 0.5
        return [float(x) for x in trainer._meta_loss.objectives(6, lambda inputs: spread[: len(inputs)])]

    few, many, other = objectives(outer_steps=2), objectives(outer_steps=3), objectives(outer_steps=2, seed=5)
    assert (len(few), len(many), many[: len(few)]) == (2 * 5, 3 * 5, few)
    assert other != few


def test_a_step_is_judged_by_the_other_batch() -> None:
    model, asked = Split(), []
    tuner = Tuner.for_model(model, "exp")

    def other() -> Tensor:
        asked.append(1)
        return model(-1.0)  # what helps one hurts the other

    row = visit(MetaTrainer(model, tuner, config(second_batch=True)), model, other=other)
    assert asked == [1]
    assert row["meta_loss"] > -8.0


def test_the_signal_is_the_centred_losss_once_a_round_has_settled() -> None:
    model = Split()
    trainer = MetaTrainer(model, Tuner.for_model(model, "exp"), config(meta_loss="expected", settle=3))
    asked = []

    def centred(position: int) -> Tensor:
        asked.append(position)
        return model(1.0)

    known = []
    for position in (0, 1, 2, 3, 4, 5, 0, 1):
        row = visit(trainer, model, centred=partial(centred, position), number=position, position=position)
        known.append(math.isfinite(row["gain"]))
    assert asked == [3, 4, 5]
    assert known == [False, True, True, False, True, True, False, True]  # nothing is known of an earlier point
    asked.clear()
    visit(trainer, model, number=9, position=9)  # a task without one
    assert asked == []


@pytest.mark.filterwarnings("ignore:.*read outside")
def test_nets_are_told_of_the_last_point_of_the_same_task() -> None:
    model = Split()
    tuner = Tuner.for_model(model, "exp")
    trained_bank(tuner)
    seen: list[tuple[list[float], float | None]] = []
    original = FeatureSpec.__call__

    def spied(self: FeatureSpec, features: Tensor, loss_start: float | None = None) -> Tensor:
        seen.append((features[0, :3].tolist(), loss_start))
        return original(self, features, loss_start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureSpec, "__call__", spied)
        trainer = MetaTrainer(model, tuner, config())
        rows = [
            visit(trainer, partial(model, slope), number=number, position=position, task=task)
            for number, (task, slope, position) in enumerate(
                [("one", 1.0, 0), ("two", 5.0, 1), ("two", 6.0, 2), ("one", 2.0, 3), ("one", 3.0, 4), ("two", 5.0, 0)]
            )
        ]
    losses = [row["loss"] for row in rows]
    told = [(sum(features[:2]) / 2, start) for features, start in seen]
    expected = [(0, None), (0, None), (losses[1], losses[1]), (losses[0], losses[0]), (losses[3], losses[0]), (0, None)]
    for (loss, start), (wanted, wanted_start) in zip(told, expected, strict=True):
        assert loss == pytest.approx(wanted)
        assert start == (None if wanted_start is None else pytest.approx(wanted_start))
    assert [features[2] == 1.0 for features, _ in seen] == [True, True, False, False, False, True]
