# SPDX-License-Identifier: Apache-2.0
"""`RidgeStatistics`: the sums from which ridge regression computes a router, so that a domain can be added later."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .errors import UpcycleError


RIDGE_FOLDER = "router_statistics"


@dataclass(frozen=True)
class RidgeStatistics:
    """
    Sums over the router inputs `x` `(H,)` of one layer: all that ridge regression needs to know of them.

    Args:
        gram (`torch.Tensor` of shape `(H, H)`): Sum of `x x^T` over all tokens, float64.
        sums (`torch.Tensor` of shape `(D, H)`): Sum of `x` over the tokens of each domain, float64.
    """

    gram: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def of(cls, inputs_TH: torch.Tensor, domain_T: torch.Tensor, num_domains: int) -> "RidgeStatistics":
        """The sums over T tokens, of which token t belongs to domain `domain_T[t]`."""
        x_TH = inputs_TH.double()
        sums_DH = torch.zeros(num_domains, x_TH.shape[1], dtype=torch.float64).index_add(0, domain_T, x_TH)
        return cls(x_TH.T @ x_TH, sums_DH)

    def with_domains_of(self, other: "RidgeStatistics") -> "RidgeStatistics":
        """The sums over the tokens of both, the domains of `other` behind those of `self`."""
        return RidgeStatistics(self.gram + other.gram, torch.cat([self.sums, other.sums]))

    def solve(self, penalty: float) -> torch.Tensor:
        """
        The rows `(D, H)` that minimise `sum_t |W x_t - onehot(domain_t)|^2 + lambda |W|^2`, float64.

        Args:
            penalty (`float`): lambda, relative to the mean of the diagonal of `gram`.
        """
        strength = penalty * self.gram.diagonal().mean()
        regular = self.gram + strength * torch.eye(len(self.gram), dtype=torch.float64)
        return torch.linalg.solve(regular, self.sums.T).T

    def save(self, folder: Path, layer_index: int) -> None:
        """Write the sums of a layer into `folder`."""
        folder.mkdir(exist_ok=True)
        tensors = {"gram": self.gram.contiguous(), "sums": self.sums.contiguous()}
        save_file(tensors, folder / _file_name(layer_index))

    @classmethod
    def load(cls, folder: str | Path, layer_index: int, hidden_size: int) -> "RidgeStatistics":
        """
        Read what [`~RidgeStatistics.save`] wrote.

        Raises:
            UpcycleError: if there are none for this layer, or if they are of another hidden size.
        """
        path = Path(folder) / _file_name(layer_index)
        if not path.is_file():
            raise UpcycleError(
                f"`router_statistics` {folder} has no file {path.name}. It must be the folder {RIDGE_FOLDER!r} of a conversion "
                "with router_init='ridge' and the same layers."
            )
        tensors = load_file(path)
        if tensors["gram"].shape != (hidden_size, hidden_size):
            raise UpcycleError(
                f"{path} holds sums of a model with hidden size {len(tensors['gram'])}, but this one has {hidden_size}."
            )
        return cls(tensors["gram"], tensors["sums"])


def _file_name(layer_index: int) -> str:
    return f"layer-{layer_index:05d}.safetensors"
