"""`python -m edgedistill`, so that `accelerate launch -m edgedistill` works too."""

from edgedistill.cli import main

if __name__ == "__main__":
    main()
