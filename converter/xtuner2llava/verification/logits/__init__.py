"""Whether the folder computes what the trained model computes.

Both models run in float32 on a fixed image and prompt, layer by layer, in the classes of the
installed transformers: the trained one in its own architecture, under its own names; the folder as
its config says. What no comparison of tensors can see shows here: a wrong rule whose shapes fit,
another rope_theta, another epsilon.
"""
