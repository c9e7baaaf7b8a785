"""``python -m fedge_client`` is ``fedge-client``."""

import sys

from fedge_client.start import main

if __name__ == "__main__":
    sys.exit(main())
