"""Flushes denormal numbers to zero: a processor takes many times longer for them, and no answer depends on them.

The processor has the mode per thread, and nets run in the thread of their caller. So each call of a net sets the mode
and restores it, and the rest of the process computes as IEEE 754 says. Only Linux on x86-64 and ARM64 has this here;
elsewhere nothing is set.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import Any, NamedTuple


class _Layout(NamedTuple):
    """`fenv_t` of the C library: its size in bytes, the place of the control word, and the bits that flush."""

    size: int
    place: int
    bits: int


_LAYOUTS = {"x86_64": _Layout(32, 28, 1 << 15 | 1 << 6), "aarch64": _Layout(8, 0, 1 << 24)}
_LIBRARY: Any = ctypes.PyDLL(None)
_get_environment, _set_environment = _LIBRARY.fegetenv, _LIBRARY.fesetenv
_LAYOUT = _LAYOUTS.get(platform.machine()) if sys.platform == "linux" else None


def _flushing(layout: _Layout) -> ctypes.Array[ctypes.c_char]:
    """Return the environment of this thread, changed so that it flushes denormals."""
    environment = ctypes.create_string_buffer(layout.size)
    _get_environment(environment)
    word = ctypes.c_uint32.from_buffer(environment, layout.place)
    word.value |= layout.bits
    return environment


_FLUSHING = _flushing(_LAYOUT) if _LAYOUT else None
_Environment = ctypes.c_char * (_LAYOUT.size if _LAYOUT else 0)


class FlushedDenormals:
    """A context in which this thread, and threads that it starts, flush denormals to zero."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        if _LAYOUT:
            self._before = _Environment()
            _get_environment(self._before)
            _set_environment(_FLUSHING)

    def __exit__(self, *_: object) -> None:
        if _LAYOUT:
            _set_environment(self._before)
