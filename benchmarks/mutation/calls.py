"""
A plugin of pytest that notes which functions of hf_doge each test calls, and how long it takes.

    CALLS=calls/FILE.json python -m pytest tests/FILE.py -p benchmarks.mutation.calls

What a test calls in other processes is not seen.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

_PACKAGE = f"hf_doge{os.sep}"
_names = {}  # code -> "hf_doge/file.py:function", or None outside the package
_calls, _seconds = {}, {}
_running = [None]


def _name(code):
    start = code.co_filename.rfind(_PACKAGE)
    return f"{code.co_filename[start:]}:{code.co_qualname}" if start >= 0 else None


def _note(frame, event, argument):
    code = frame.f_code
    if code not in _names:
        _names[code] = _name(code)
    if _names[code] is not None:
        _calls.setdefault(_names[code], set()).add(_running[0])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Watch one test, its fixtures included."""
    _running[0] = item.nodeid
    start = time.perf_counter()
    sys.settrace(_note)
    threading.settrace(_note)
    yield
    sys.settrace(None)
    threading.settrace(None)
    _seconds[item.nodeid] = time.perf_counter() - start


def pytest_sessionfinish(session):
    """Write what was seen."""
    calls = {name: sorted(filter(None, tests)) for name, tests in _calls.items()}
    Path(os.environ["CALLS"]).write_text(json.dumps({"calls": calls, "seconds": _seconds}))
