# SPDX-License-Identifier: Apache-2.0
"""The files that travel with a checkpoint: flat, and free of imports from the rest of the package."""
