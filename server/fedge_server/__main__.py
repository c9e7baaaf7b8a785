"""``python -m fedge_server``."""

import sys

from fedge_server.cli import main

sys.exit(main())
