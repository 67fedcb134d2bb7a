# SPDX-License-Identifier: Apache-2.0
"""Name tables between published PyTorch checkpoints and the parameters of this library, in both directions."""
