"""The mapping language: YAML that says what an LLM is, and where its parts go.

    yaml, schema    text to values that know their lines, and these to dataclasses
    rules           one verb each; `apply` makes tensors of them
    config_rules    how config keys are made; `caveats` what may differ
    Family          what an LLM is: rules and config, and the plain class that it becomes
    PlainClass      what that class is: exact names, shapes and config keys, and what is not theirs
    Format          where the LLM, the projector and the tower go
    Catalogue       what is shipped, and files of the user's own; `detect` finds an LLM's family
    draft           a starter file for an LLM of no family

It knows tensors, and no checkpoint layout.
"""
