# SPDX-License-Identifier: Apache-2.0
"""Dense checkpoint to MoE checkpoint: recipe, families, targets, methods, plan, writer, parity."""

from . import router_data as router_data  # enters its initialisers in the table
