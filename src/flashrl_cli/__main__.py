"""`python -m flashrl_cli` is the `flashrl` command."""

from flashrl_cli.cli.app import main

if __name__ == "__main__":
    main()
