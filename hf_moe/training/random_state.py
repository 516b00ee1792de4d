# SPDX-License-Identifier: Apache-2.0
"""`RandomState`: where the random number generators are, so that a module can be run again with the same random numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class RandomState:
    """
    The states of the default generators of the CPU and of a device.

    Args:
        device (`torch.device`): The device.
        of_cpu (`torch.Tensor`): The state of the generator of the CPU.
        of_device (`torch.Tensor`, *optional*): That of the device, if it is another.
    """

    device: torch.device
    of_cpu: torch.Tensor
    of_device: torch.Tensor | None

    @classmethod
    def before(cls, *inputs: Any) -> "RandomState":
        """Those of this moment, of the device on which the first tensor among the inputs of a module is."""
        devices = (value.device for value in inputs if isinstance(value, torch.Tensor))
        return cls._now(next(devices, torch.device("cpu")))

    @classmethod
    def _now(cls, device: torch.device) -> "RandomState":
        if device.type in ("cpu", "meta"):
            return cls(device, torch.get_rng_state(), None)
        return cls(device, torch.get_rng_state(), torch.get_device_module(device).get_rng_state(*cls._where(device)))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same random numbers once more; behind it those are drawn that would have been drawn without it."""
        after = RandomState._now(self.device)
        self._restore()
        try:
            yield
        finally:
            after._restore()

    def _restore(self) -> None:
        torch.set_rng_state(self.of_cpu)
        if self.of_device is not None:
            torch.get_device_module(self.device).set_rng_state(self.of_device, *self._where(self.device))

    @staticmethod
    def _where(device: torch.device) -> tuple[torch.device, ...]:
        return () if device.type == "mps" else (device,)  # of which there is one
