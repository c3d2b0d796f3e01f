"""python -m ptv2_fast.cli"""

import sys

from ptv2_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
