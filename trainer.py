"""The console script, from a checkout."""

from infctx.cli import main

if __name__ == "__main__":
    main()
