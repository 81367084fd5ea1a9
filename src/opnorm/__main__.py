"""`python -m opnorm`: the command line."""

from opnorm.cli import main

if __name__ == "__main__":
    main(prog_name="opnorm")
