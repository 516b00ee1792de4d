# SPDX-License-Identifier: Apache-2.0
"""Changing mixtures of experts that exist: expand, prune, merge, collapse, and experts as files of their own."""
