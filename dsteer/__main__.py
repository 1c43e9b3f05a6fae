"""``python -m dsteer``."""

from dsteer.cli import main

if __name__ == "__main__":
    main()
