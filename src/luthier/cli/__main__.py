"""`python -m luthier.cli`, where the command itself is not on the path."""

from luthier.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
