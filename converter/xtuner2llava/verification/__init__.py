"""Proof that a converted folder is right: by itself, against its checkpoint, and at work.

By itself, it knows what the output looks like (`layout.py`), and nothing of how it is written.
Against the checkpoint, the plan is made again. At work, the source model runs in its own class.
"""

from xtuner2llava.verification.outcome import Check, Verification
from xtuner2llava.verification.run import verify_folder

__all__ = ["Check", "Verification", "verify_folder"]
