"""Proof that a converted folder is right: by itself, against its checkpoint, and at work.

It shares little with the conversion that it judges: see `recomputed/__init__.py` for what. It knows
what the output looks like (`layout.py`), and nothing of how it is written.
"""

from xtuner2llava.verification.outcome import Check, Verification
from xtuner2llava.verification.run import verify_folder

__all__ = ["Check", "Verification", "verify_folder"]
