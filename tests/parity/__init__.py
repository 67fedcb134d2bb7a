# SPDX-License-Identifier: Apache-2.0
"""A package, so that a parity test may have the name of the test of the module it checks."""
