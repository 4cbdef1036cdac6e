"""Proof that a converted folder is right: by itself, against its checkpoint, and at work.

By itself, it is held against what loaders read (`folder.py`), not against how it was written.
Against the checkpoint, the plan is made again. At work, the trained model runs in its own class.
"""
