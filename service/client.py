"""Deprecated: import from `lvm` instead."""

import warnings

from lvm.client import *  # noqa: F403

warnings.warn("service.client is deprecated: import lvm.client instead", DeprecationWarning, stacklevel=2)
