# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The one error of this package."""

from __future__ import annotations


class CalibrationError(ValueError):
    """A model cannot be calibrated, or a calibration cannot be used: what was found, and how to go on."""
