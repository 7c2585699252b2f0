"""`python -m rectiflow`, also the entry for `accelerate launch -m rectiflow`."""

from rectiflow.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
