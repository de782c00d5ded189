"""`python -m leankv_mlx.cli` is `leankv`."""

from leankv_mlx.cli import main

if __name__ == "__main__":
    main()
