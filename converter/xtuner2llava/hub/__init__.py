"""All that speaks to the Hugging Face Hub; huggingface_hub does the requests.

download  models and checkpoints by repo id, from the cache or the Hub   download.py
published a converted model there, looked at without its tensors   published.py
stream    tensors of a base model, read by HTTP range                    stream.py
upload    a checked folder, or shard by shard; one commit      folder.py, push.py, upload.py

Only calls that huggingface_hub 0.25 and 2.x both have are used. It is imported where it is used:
that takes a quarter of a second.
"""
