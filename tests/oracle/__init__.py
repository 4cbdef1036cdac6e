"""What a converted folder must hold, computed from the checkpoint in memory.

It imports nothing of the product: `torch.load` and the safetensors package read the files, factors
are merged in float64, names and fused tensors are written down by hand. Tests compare what
`convert` wrote with it.
"""
