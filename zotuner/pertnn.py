"""PertNN: one tiny network a block that says how large the block's perturbation should be.

    features (n, 5)  ->  FeatureSpec  ->  PertNNBank (n nets in one batched call)  ->  sigma (n,)  ->  normalize

As a control, `StaticBank` has a number in place of each net.
Source: ZO Fine-tuner, arXiv:2510.00419: Linear(5, 64) - Tanh - Linear(64, 1), and |.|, 449 weights a block.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from zotuner.errors import unknown

FEATURES = ("loss_plus", "loss_minus", "sigma_prev", "mean", "var")
TRANSFORMS = ("identity", "log", "relative")
ARCHITECTURES = ("abs", "exp")
HIDDEN = 64  # units (arXiv:2510.00419)
LOSS_SCALE = 0.25  # of relative losses: what a run takes off its first loss is a quarter or a half
LIMIT = math.log(3.0)  # of the logarithm of a scale of "exp" nets, either way
TINY = 1e-12  # keeps the logarithm of a variance or a scale finite


@dataclass(frozen=True)
class FeatureSpec:
    """What a net sees of each raw feature x: (f(x) - shift) / scale.

    Attributes:
        transform: f for each of `FEATURES`: "identity", "log", or, for losses, "relative": (x - s) / |s| with s the
            loss that the run began with; 0 before it is known.
        shift: Subtracted after the transform.
        scale: Divided by after the shift; not 0.
    """

    transform: tuple[str, ...] = ("identity",) * len(FEATURES)
    shift: tuple[float, ...] = (0.0,) * len(FEATURES)
    scale: tuple[float, ...] = (1.0,) * len(FEATURES)

    def __post_init__(self) -> None:
        lengths = {len(self.transform), len(self.shift), len(self.scale)}
        if lengths != {len(FEATURES)}:
            raise ValueError(f"a feature specification needs {len(FEATURES)} entries a list, got {sorted(lengths)}")
        for name in self.transform:
            if name not in TRANSFORMS:
                raise ValueError(unknown("feature transform", name, TRANSFORMS))
        numbers = (*self.shift, *self.scale)
        if not all(math.isfinite(x) for x in numbers) or 0.0 in self.scale:
            raise ValueError(f"shift and scale must be finite and scale not 0, got {self.shift} and {self.scale}")

    def __call__(self, features: Tensor, loss_start: float | None = None) -> Tensor:
        """Raw features (n, 5) to what the nets see, (n, 5) of the same dtype.

        Args:
            features: In the order of `FEATURES`.
            loss_start: The loss that the run began with; None: it begins now.
        """
        log, relative = (torch.tensor([t == name for t in self.transform]) for name in TRANSFORMS[1:])
        x = torch.where(log, torch.log(features.clamp_min(0) + TINY), features)
        share = (
            torch.zeros_like(features) if loss_start is None else (features - loss_start) / max(abs(loss_start), TINY)
        )
        x = torch.where(relative, share, x)
        return (x - torch.tensor(self.shift, dtype=x.dtype)) / torch.tensor(self.scale, dtype=x.dtype)

    @classmethod
    def standardized(cls, mean: Tensor, var: Tensor) -> Self:
        """For the "exp" architecture: relative losses, log scale, log variance, statistics standardised over blocks.

        Args:
            mean: (n,) of the blocks of the model that the nets are made for.
            var: (n,) likewise.
        """
        log_var = torch.log(var + TINY)
        spread = [float(x.std()) if x.numel() > 1 else 1.0 for x in (mean, log_var)]
        mean_scale, var_scale = (x if x > 0 else 1.0 for x in spread)
        return cls(
            transform=("relative", "relative", "log", "identity", "log"),
            shift=(0.0, 0.0, 0.0, float(mean.mean()), float(log_var.mean())),
            scale=(LOSS_SCALE, LOSS_SCALE, 1.0, mean_scale, var_scale),
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `FeatureSpec(**d)` with its lists as tuples, and without `names`, is the same specification."""
        fields = {"transform": self.transform, "shift": self.shift, "scale": self.scale}
        return {"names": list(FEATURES), **{key: list(value) for key, value in fields.items()}}


class PertNNBank(nn.Module):
    """The PertNNs of all blocks, stacked.

    "abs" is the paper's: sigma = |net(x)|, weights drawn as `nn.Linear` draws them. "exp" is sigma =
    exp(l tanh(net(x) / l)), l = log 3, with the last layer 0 at the start: it begins at sigma = 1, which is MeZO, a
    step changes sigma by a factor, and no block has more than 3 or less than 1/3 before the normalisation.

    Args:
        blocks: Number of nets, n.
        architecture: "abs" or "exp".
        seed: Of the initial weights; the global random state is not touched.

    Example:
        >>> PertNNBank(3, "exp")(torch.zeros(3, 5))
        tensor([1., 1., 1.], grad_fn=<ExpBackward0>)
    """

    def __init__(self, blocks: int, architecture: str = "abs", *, seed: int = 0) -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(unknown("PertNN architecture", architecture, ARCHITECTURES))
        self.architecture = architecture
        random = torch.Generator().manual_seed(seed)

        def uniform(*shape: int, fan_in: int) -> nn.Parameter:
            bound = fan_in**-0.5  # nn.Linear's default: kaiming_uniform with a = sqrt(5)
            return nn.Parameter((torch.rand(shape, generator=random) * 2 - 1) * bound)

        self.w1 = uniform(blocks, HIDDEN, len(FEATURES), fan_in=len(FEATURES))
        self.b1 = uniform(blocks, HIDDEN, fan_in=len(FEATURES))
        self.w2 = uniform(blocks, HIDDEN, fan_in=HIDDEN)
        self.b2 = uniform(blocks, fan_in=HIDDEN)
        if architecture == "exp":
            with torch.no_grad():
                self.w2.zero_()
                self.b2.zero_()

    def chosen(self, nets: Sequence[int]) -> "PertNNBank":
        """A bank of its own with copies of the nets of these numbers, in this order."""
        bank = PertNNBank(len(nets), self.architecture)
        bank.load_state_dict({name: tensor[list(nets)] for name, tensor in self.state_dict().items()}, assign=True)
        return bank

    def forward(
        self,
        x: Tensor,  # (m, 5), or (..., m, 5)
        nets: Tensor | None = None,  # (m,) which net each row goes to; None: all, in order
    ) -> Tensor:  # (m,) or (..., m): raw sigma
        w1, b1, w2, b2 = (p if nets is None else p[nets] for p in (self.w1, self.b1, self.w2, self.b2))
        # elementwise, not as a matrix product, whose last bits depend on where its operands lie in memory
        hidden = torch.tanh((w1 * x.to(w1.dtype)[..., None, :]).sum(dim=-1) + b1)
        out = (w2 * hidden).sum(dim=-1) + b2
        return out.abs() if self.architecture == "abs" else torch.exp(LIMIT * torch.tanh(out / LIMIT))


class StaticBank(nn.Module):
    """A number a block in place of a net: scales that are the same whatever they are told.

    Args:
        sigma: (blocks,) raw scales, finite, not negative, not all 0.

    Raises:
        ValueError: Other numbers.

    Example:
        >>> StaticBank(torch.tensor([2.0, 0.5]))(torch.zeros(2, 5)).tolist()
        [2.0, 0.5]
    """

    def __init__(self, sigma: Tensor) -> None:
        super().__init__()
        sigma = sigma.detach().float()
        if not (bool(torch.isfinite(sigma).all()) and bool((sigma >= 0).all()) and bool((sigma > 0).any())):
            raise ValueError(f"scales must be finite, not negative and not all 0, got {sigma.tolist()[:8]}")
        self.sigma = nn.Parameter(sigma)

    def forward(
        self,
        x: Tensor,  # (m, 5)
        nets: Tensor | None = None,  # (m,) which number each row takes; None: all, in order
    ) -> Tensor:  # (m,) raw sigma
        return self.sigma.clone() if nets is None else self.sigma[nets]


Bank = PertNNBank | StaticBank


def normalize(
    sigma: Tensor,  # (..., n) raw scales, not negative
    numels: Tensor,  # (n,) elements a block
) -> Tensor:  # (..., n) float64
    """sigma~ = sigma sqrt(d / sum_j d_j sigma_j^2): the perturbation keeps MeZO's expected norm (arXiv:2510.00419).

    In float64, so that scales of 1 come out as exactly 1.
    """
    sigma, numels = sigma.double(), numels.double()
    return sigma * torch.sqrt(numels.sum() / (numels * sigma**2).sum(dim=-1, keepdim=True))
