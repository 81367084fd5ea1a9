"""The command line. Each command imports torch when it runs, never before."""

from opnorm.cli.main import main

__all__ = ["main"]
