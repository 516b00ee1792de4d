# SPDX-License-Identifier: Apache-2.0
"""The `hf-moe` command; one module per topic, heavy imports inside the commands."""
