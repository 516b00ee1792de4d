# SPDX-License-Identifier: Apache-2.0
"""`ExpertLoraError`: what cannot be done with the adapters of experts, and what to do instead."""


class ExpertLoraError(ValueError):
    """Raised when an adapter or a model does not allow what was asked for."""
