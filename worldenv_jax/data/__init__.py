# SPDX-License-Identifier: Apache-2.0
"""Episodes on disk and in memory: reading, writing, statistics, windows. NumPy only; no TensorFlow."""
