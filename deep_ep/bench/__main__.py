"""`python -m deep_ep.bench`: another name of `python -m deep_ep bench`."""

import sys

from deep_ep.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
