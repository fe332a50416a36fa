"""Deprecated: import from `lvm` instead."""

import warnings

from lvm.errors import *  # noqa: F403

warnings.warn("service.errors is deprecated: import lvm.errors instead", DeprecationWarning, stacklevel=2)
