"""Lets the tests of this folder import the helpers that lie beside them, under every import mode of pytest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
