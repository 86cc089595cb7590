"""`python -m kvpress`: the `kvpress` command."""

from kvpress.cli import app

if __name__ == "__main__":
    app(prog_name="kvpress")
