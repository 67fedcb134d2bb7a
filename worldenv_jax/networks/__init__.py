# SPDX-License-Identifier: Apache-2.0
"""Flax blocks used by at least two of policy, simulator and reflector; seen by nobody else."""
