# SPDX-License-Identifier: Apache-2.0
"""`UpcycleError`, the one error of everything that makes or changes a mixture of experts on disk."""


class UpcycleError(ValueError):
    """A conversion that cannot be done; the message says what was given, what is allowed and what to do next."""
