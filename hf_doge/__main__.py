"""`python -m hf_doge`, also under `accelerate launch -m hf_doge`."""

from hf_doge.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
