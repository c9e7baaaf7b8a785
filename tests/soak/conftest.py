"""The arena and its mutations are modules beside the tests and the long form."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
