# SPDX-License-Identifier: Apache-2.0
"""Measurements and their presentation: video quality, reward calibration, the gate, agreement, strips, the report."""
