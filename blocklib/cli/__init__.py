"""The command line: one module per command, imported when it is called.  Nothing else prints or reads the environment."""

from __future__ import annotations
