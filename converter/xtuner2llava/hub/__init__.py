"""All that speaks to the Hugging Face Hub; huggingface_hub does the requests.

download.py   models and checkpoints by repo id, from the cache or the Hub
published.py  a converted model there, without the data of its tensors
stream.py     tensors of a base model, read by HTTP range
upload.py     files sent one by one, and the commit that makes them visible
push.py       a folder that `verify` finds right, or a conversion shard by shard
errors.py     what fails, as errors that say what to do

Only calls that huggingface_hub 0.25 and 2.x both have are used. It is imported where it is used:
that takes a quarter of a second.
"""
