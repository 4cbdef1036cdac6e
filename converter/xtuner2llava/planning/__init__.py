"""From a checkpoint and the user's choices to a `Plan`. All strictness lives here.

Every tensor of the checkpoint is used once or dropped with a reason, every tensor of the plain
class is made once with its shape, and everything that is wrong is said at once.
"""
