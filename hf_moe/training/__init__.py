# SPDX-License-Identifier: Apache-2.0
"""Seeing and steering the router: routing statistics and the recorder that collects them."""
