"""`python -m xtuner2llava`."""

from xtuner2llava.cli.commands import main

if __name__ == "__main__":
    main(prog_name="xtuner2llava")
