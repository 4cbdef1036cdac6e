"""Writing safetensors shards and the output folder. It knows tensors, and neither XTuner nor LLaVA.

The order of use: `plan_shards`, `OutputFolder`, `write_shards` (which verifies), small files,
`OutputFolder.publish`.
"""
