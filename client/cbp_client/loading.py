"""Loads gRPC, before any other module of this package does.

Its core comes with handlers of its own for a fork, which make a forked process crash when it ends or forks again,
though Python's part of gRPC leaves them unused unless it is told otherwise. They are left out here, unless the
environment asks for them or somebody has loaded gRPC already. The setting is read once, while gRPC is loaded, so that
the environment is as before in the end.
"""

import importlib
import os
import sys

_SETTING = "GRPC_ENABLE_FORK_SUPPORT"

if "grpc" not in sys.modules and _SETTING not in os.environ:
    os.environ[_SETTING] = "0"
    try:
        importlib.import_module("grpc")
    finally:
        del os.environ[_SETTING]
