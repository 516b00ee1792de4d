# SPDX-License-Identifier: Apache-2.0
"""What is published with a model: its card."""
