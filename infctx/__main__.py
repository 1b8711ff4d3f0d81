"""`python -m infctx` is the console script."""

from infctx.cli import main

if __name__ == "__main__":
    main()
