"""Launcher for a checkout: `python cli.py fuse model.keras` does what the installed `deploykit` does."""

from deploykit.cli import main

if __name__ == "__main__":
    main()
