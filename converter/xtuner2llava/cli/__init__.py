"""The command line: a verb a function, over the Python API."""
