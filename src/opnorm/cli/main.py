"""`opnorm`: the group of commands, found by name and imported only when one is called."""

import os
import sys
import traceback
from importlib import import_module
from typing import Any

import click

from opnorm._version import __version__
from opnorm.errors import OpnormError

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("opnorm.cli.demo:demo", "The whole story in under a minute, on data that the package carries."),
    "audit": ("opnorm.cli.audit:audit", "Measure the norm of every weight in a checkpoint."),
    "normalize": (
        "opnorm.cli.normalize:normalize",
        "Divide every weight of a checkpoint by its norm, with a certificate.",
    ),
    "bound": ("opnorm.cli.bound:bound", "Bound the Lipschitz constant of a model in code (runs that code)."),
    "verify": ("opnorm.cli.verify:verify", "Re-check a certificate without trusting the code that wrote it."),
}
"""Name of a command -> (where it lives, what the list of commands says of it)."""

EXIT_UNUSABLE = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called; an `OpnormError` becomes one line and exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the names of the commands, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command called `cmd_name`, or None where there is none."""
        if cmd_name not in COMMANDS:
            return None
        module, function = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(import_module(module), function)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table, importing none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; a failure is never exit code 1, which says that a policy was violated."""
        try:
            return super().invoke(ctx)
        except OpnormError as error:
            click.echo(f"opnorm: {_one_line(str(error))}", err=True)
            sys.exit(EXIT_UNUSABLE)
        except BrokenPipeError:
            # Whoever read stdout has gone; without this the interpreter complains again when it flushes.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(EXIT_BROKEN_PIPE)
        except KeyboardInterrupt:
            click.echo("opnorm: interrupted; nothing was written", err=True)
            sys.exit(EXIT_INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception:
            traceback.print_exc()
            click.echo("opnorm: this is a bug in opnorm; please report it with the lines above", err=True)
            sys.exit(EXIT_UNUSABLE)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="opnorm %(version)s")
def main() -> None:
    """Divide by the spectral norm, and mean it.

    Exit codes: 0 clean, 1 a rule of --fail-on was violated, 2 could not read, or wrong usage.
    """


def _one_line(text: str) -> str:
    """Join the lines, and write out what does not print: names in a hostile file must not steer the terminal."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)
