"""The references of docs/: the command line and the Python API, written from the sources."""

from evidence.reference import command_line, python_api
from evidence.reference.python_api import ROOT

__all__ = ["PAGES", "ROOT"]
PAGES = {"docs/cli.md": command_line.page, "docs/python-api.md": python_api.page}
