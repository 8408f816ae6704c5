"""PertNN: the bank of nets against nets built one by one, the features, the normalisation."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zotuner.pertnn import ARCHITECTURES, FEATURES, HIDDEN, TINY, FeatureSpec, PertNNBank, normalize

BLOCKS = 7
OUTPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "exp": lambda x: 3 ** torch.tanh(x / math.log(3)),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled_bank(architecture: str) -> PertNNBank:
    """A bank whose weights are all different from 0."""
    bank = PertNNBank(BLOCKS, architecture)
    with torch.no_grad():
        for seed, param in enumerate(bank.parameters()):
            param.copy_(random(*param.shape, seed=seed) / 4)
    return bank


def separate(bank: PertNNBank) -> list[nn.Sequential]:
    """The paper's nets, one by one, with the bank's weights."""
    nets = []
    for i in range(bank.b2.numel()):
        net = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1))
        state = {"0.weight": bank.w1[i], "0.bias": bank.b1[i], "2.weight": bank.w2[i][None], "2.bias": bank.b2[i][None]}
        net.load_state_dict({name: value.detach().clone() for name, value in state.items()})
        nets.append(net)
    return nets


# The bank


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_bank_computes_what_separate_nets_compute(architecture: str) -> None:
    bank, x = filled_bank(architecture), random(BLOCKS, 5, seed=9)
    expected = torch.cat([OUTPUT[architecture](net(row)) for net, row in zip(separate(bank), x, strict=True)])
    found = bank(x)
    assert (found.shape, found.dtype) == ((BLOCKS,), torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found >= 0).all()


def test_the_two_architectures_share_the_net_and_differ_in_the_output() -> None:
    a, e, x = filled_bank("abs"), filled_bank("exp"), random(BLOCKS, 5)
    torch.testing.assert_close(torch.atanh(e(x).log() / math.log(3)).abs() * math.log(3), a(x), rtol=1e-4, atol=1e-5)
    assert (e(x) < 1).any()  # some outputs are negative before |.|


def test_an_exp_net_gives_a_block_a_third_to_three_times_a_plain_scale() -> None:
    bank = PertNNBank(2, "exp")
    with torch.no_grad():
        bank.b2.copy_(torch.tensor([1e3, -1e3]))
    assert bank(torch.zeros(2, 5)).tolist() == pytest.approx([3.0, 1 / 3])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_block_has_449_weights(architecture: str) -> None:
    for blocks in (1, 2, 772):
        assert sum(p.numel() for p in PertNNBank(blocks, architecture).parameters()) == 449 * blocks
    assert sum(p.numel() for p in separate(PertNNBank(1, architecture))[0].parameters()) == 449


def test_exp_begins_at_exactly_one() -> None:
    sigma = PertNNBank(BLOCKS, "exp", seed=3)(random(BLOCKS, 5) * 100)
    assert torch.equal(sigma, torch.ones(BLOCKS))


def test_exp_can_leave_one() -> None:
    bank = PertNNBank(BLOCKS, "exp")
    bank(random(BLOCKS, 5)).sum().backward()
    assert bank.w2.grad is not None
    assert (bank.w2.grad.abs().sum(dim=1) > 0).all()


def test_abs_is_initialised_as_nn_linear_is() -> None:
    bank = PertNNBank(400, "abs", seed=1)
    for param, fan_in in ((bank.w1, 5), (bank.b1, 5), (bank.w2, HIDDEN), (bank.b2, HIDDEN)):
        bound, values = fan_in**-0.5, param.detach().double()
        assert float(values.abs().max()) <= bound
        assert float(values.abs().max()) > 0.98 * bound
        error = 1 / math.sqrt(values.numel())  # of a mean, in units of the standard deviation
        assert abs(float(values.mean())) < 5 * error * bound / math.sqrt(3)
        assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=5 * error)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_bank_leaves_the_global_random_state_alone(architecture: str) -> None:
    before = torch.get_rng_state()
    first = PertNNBank(3, architecture, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(987)
        second = PertNNBank(3, architecture, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_seeds_and_blocks_have_different_weights() -> None:
    first, second = PertNNBank(3, "abs", seed=1), PertNNBank(3, "abs", seed=2)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert not torch.equal(a, b)
        assert not torch.equal(a[0], a[1])
    assert not torch.equal(PertNNBank(3, "exp", seed=1).w1, PertNNBank(3, "exp", seed=2).w1)


def test_an_unknown_architecture_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown PertNN architecture 'relu'; known: abs, exp"):
        PertNNBank(3, "relu")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_go_to_the_nets_they_name(architecture: str) -> None:
    bank, x = filled_bank(architecture), random(4, 5, seed=9)
    chosen = [6, 0, 0, 3]
    nets = separate(bank)
    expected = torch.cat([OUTPUT[architecture](nets[net](row)) for net, row in zip(chosen, x, strict=True)])
    torch.testing.assert_close(bank(x, torch.tensor(chosen)), expected, rtol=1e-5, atol=1e-6)


def test_naming_all_nets_in_order_changes_nothing() -> None:
    bank, x = filled_bank("abs"), random(BLOCKS, 5)
    assert torch.equal(bank(x, torch.arange(BLOCKS)), bank(x))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_blocks_gradient_reaches_its_own_net_alone(architecture: str) -> None:
    bank, x = filled_bank(architecture), random(BLOCKS, 5)
    bank(x)[2].backward()
    for param in bank.parameters():
        assert param.grad is not None
        touched = param.grad.reshape(BLOCKS, -1).abs().sum(dim=1) > 0
        assert touched.tolist() == [i == 2 for i in range(BLOCKS)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_the_separate_nets(architecture: str) -> None:
    bank, x, weights = filled_bank(architecture), random(BLOCKS, 5, seed=4), random(BLOCKS, seed=5)
    nets = separate(bank)
    (bank(x) * weights).sum().backward()
    sum(w * OUTPUT[architecture](net(row))[0] for w, net, row in zip(weights, nets, x, strict=True)).backward()
    for i, net in enumerate(nets):
        pairs = zip((bank.w1, bank.b1, bank.w2, bank.b2), net.parameters(), strict=True)
        for stacked, single in pairs:
            torch.testing.assert_close(stacked.grad[i].reshape(-1), single.grad.reshape(-1), rtol=1e-4, atol=1e-6)


# Normalisation

SIGMAS = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=30)


@given(sigmas=SIGMAS, data=st.data())
@settings(deadline=None, max_examples=60)
def test_normalized_scales_keep_the_frobenius_budget(sigmas: list[float], data: st.DataObject) -> None:
    numels = data.draw(st.lists(st.integers(1, 10**8), min_size=len(sigmas), max_size=len(sigmas)))
    sigma, d = torch.tensor(sigmas), torch.tensor(numels)
    scaled = normalize(sigma, d)
    assert scaled.dtype == torch.float64
    assert float((d * scaled**2).sum()) == pytest.approx(sum(numels), rel=1e-12)
    torch.testing.assert_close(scaled / scaled[0], sigma.double() / sigma[0].double(), rtol=1e-12, atol=0)


@given(numels=st.lists(st.integers(1, 10**9), min_size=1, max_size=300))
@settings(deadline=None, max_examples=40)
def test_scales_of_one_come_out_as_exactly_one(numels: list[int]) -> None:
    assert torch.equal(normalize(torch.ones(len(numels)), torch.tensor(numels)), torch.ones(len(numels)).double())


@given(sigmas=SIGMAS, factor=st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=40)
def test_a_common_factor_cancels(sigmas: list[float], factor: float) -> None:
    sigma, d = torch.tensor(sigmas).double(), torch.arange(1, len(sigmas) + 1)
    torch.testing.assert_close(normalize(factor * sigma, d), normalize(sigma, d), rtol=1e-12, atol=0)


def test_the_normalised_scale_is_the_papers_formula() -> None:
    found = normalize(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([10, 5, 15]))
    assert found.tolist() == pytest.approx([1.0, 2.0, 0.0])  # sqrt(30 / (10 + 20)) = 1
    found = normalize(torch.tensor([1.0, 3.0]), torch.tensor([1, 1]))
    assert found.tolist() == pytest.approx([math.sqrt(0.2), 3 * math.sqrt(0.2)])


def test_gradients_pass_the_normalisation() -> None:
    sigma = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    numels = torch.tensor([4, 100, 7])
    assert torch.autograd.gradcheck(lambda s: normalize(s, numels), (sigma,))
    normalize(sigma, numels).log().sum().backward()
    assert sigma.grad is not None
    assert abs(float((sigma.grad * sigma.detach()).sum())) < 1e-12  # nothing is gained by scaling all


# Features


def test_a_plain_specification_passes_features_unchanged() -> None:
    x = random(BLOCKS, 5)
    assert torch.equal(FeatureSpec()(x), x)
    assert FEATURES == ("loss_plus", "loss_minus", "sigma_prev", "mean", "var")


def test_features_are_transformed_then_shifted_then_scaled() -> None:
    spec = FeatureSpec(("identity", "log", "identity", "log", "identity"), (0, 1, 2, 0, 0.5), (1, 1, 4, 2, -1))
    x = torch.tensor([[3.0, math.e, 6.0, math.e**4, 0.0], [-1.0, 1.0, 2.0, 1.0, 1.0]])
    torch.testing.assert_close(spec(x), torch.tensor([[3.0, 0.0, 1.0, 2.0, 0.5], [-1.0, -1.0, 0.0, 0.0, -0.5]]))


@pytest.mark.parametrize(
    ("start", "seen"), [(None, 0.0), (4.0, -0.25), (2.0, 0.5), (-3.0, 2.0), (0.0, 3 / TINY), (3.0, 0.0)]
)
def test_a_relative_loss_is_the_share_by_which_it_has_changed(start: float | None, seen: float) -> None:
    spec = FeatureSpec(transform=("relative", "relative", "identity", "identity", "log"))
    found = spec(torch.tensor([[3.0, 3.0, 3.0, 3.0, 1.0]]), start)
    torch.testing.assert_close(found, torch.tensor([[seen, seen, 3.0, 3.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_logarithm_of_nothing_is_finite(dtype: torch.dtype) -> None:
    spec = FeatureSpec(transform=("log",) * 5)
    x = torch.tensor([[0.0, -1.0, 1.0, 1e-30, 1e30]], dtype=dtype)
    found = spec(x)
    assert found.dtype == dtype
    expected = [math.log(TINY), math.log(TINY), 0.0, math.log(TINY), math.log(1e30)]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_standardized_statistics_have_mean_zero_and_deviation_one() -> None:
    mean, var = random(40) * 0.3 + 0.1, random(40, seed=1).exp() * 1e-3
    ones = torch.ones(40)
    found = FeatureSpec.standardized(mean, var)(torch.stack([2 * ones, 3 * ones, ones, mean, var], dim=1), 2.0)
    assert found[:, :2].unique().tolist() == [0.0, 2.0]
    assert float(found[:, 2].abs().max()) < 1e-6  # log of a scale of 1
    assert found[:, 3:].mean(dim=0).tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    assert found[:, 3:].std(dim=0).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


@pytest.mark.parametrize(
    ("mean", "var"),
    [([0.5], [0.1]), ([1.0, 1.0], [0.0, 0.0]), ([0.0, 1.0, 1.0], [1e-4, 0.0, 0.0])],
    ids=["one block", "all alike", "norms at their start"],
)
def test_degenerate_statistics_are_standardized_to_finite_numbers(mean: list[float], var: list[float]) -> None:
    m, v = torch.tensor(mean), torch.tensor(var)
    ones = torch.ones(len(mean))
    assert torch.isfinite(FeatureSpec.standardized(m, v)(torch.stack([ones, ones, ones, m, v], dim=1))).all()


def test_a_specification_survives_json() -> None:
    spec = FeatureSpec.standardized(random(9), random(9, seed=1).exp())
    written = json.loads(json.dumps(spec.to_dict()))
    assert written.pop("names") == list(FEATURES)
    assert FeatureSpec(**{key: tuple(value) for key, value in written.items()}) == spec


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"transform": ("identity",) * 4}, r"needs 5 entries a list, got \[4, 5\]"),
        ({"shift": ()}, r"needs 5 entries a list, got \[0, 5\]"),
        ({"scale": (1.0,) * 6}, r"needs 5 entries a list, got \[5, 6\]"),
        (
            {"transform": ("logg",) * 5},
            "unknown feature transform 'logg'; did you mean 'log'. Known: identity, log, relative",
        ),
        ({"scale": (1.0, 1.0, 0.0, 1.0, 1.0)}, "finite and scale not 0"),
        ({"scale": (1.0, 1.0, math.nan, 1.0, 1.0)}, "finite and scale not 0"),
        ({"shift": (math.inf, 0.0, 0.0, 0.0, 0.0)}, "finite and scale not 0"),
    ],
    ids=str,
)
def test_a_specification_that_cannot_work_is_refused(wrong: dict[str, tuple[object, ...]], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FeatureSpec(**wrong)
