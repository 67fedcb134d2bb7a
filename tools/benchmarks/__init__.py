# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of `tools/benchmark.py`, one module per kind."""
