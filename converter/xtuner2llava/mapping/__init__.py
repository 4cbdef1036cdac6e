"""The mapping language: YAML that says what an LLM is, and where its parts go.

    Catalogue      what is shipped, and files of the user's own; which family an LLM is
    Family         what an LLM is: rules and config, and the plain class it becomes
    PlainClass     what that class is: exact names, shapes and config keys
    Format         where the LLM, the projector and the tower go
    expand, apply  rules to literal steps, steps to lazy tensors
    check_against_class   whether what is made is what the class has

It knows tensors, and no checkpoint layout.
"""

from xtuner2llava.mapping.apply import Applied, Dropped, Origin, apply
from xtuner2llava.mapping.catalogue import Catalogue, check_file
from xtuner2llava.mapping.caveats import Limit, in_range
from xtuner2llava.mapping.check import check_against_class
from xtuner2llava.mapping.draft import draft
from xtuner2llava.mapping.expand import Step, expand
from xtuner2llava.mapping.family import Chat, Family, Generation, TranslatedConfig
from xtuner2llava.mapping.fold import Folded, fold
from xtuner2llava.mapping.folder_name import FolderName, model_name
from xtuner2llava.mapping.format import COMPONENTS, Format, FormatClass
from xtuner2llava.mapping.plain_class import Expected, MappingFile, PlainClass
from xtuner2llava.mapping.prompt_templates import PromptTemplate
from xtuner2llava.mapping.rules import RuleSet

__all__ = [
    "COMPONENTS",
    "Applied",
    "Catalogue",
    "Chat",
    "Dropped",
    "Expected",
    "Family",
    "Folded",
    "FolderName",
    "Format",
    "FormatClass",
    "Generation",
    "Limit",
    "MappingFile",
    "Origin",
    "PlainClass",
    "PromptTemplate",
    "RuleSet",
    "Step",
    "TranslatedConfig",
    "apply",
    "check_against_class",
    "check_file",
    "draft",
    "expand",
    "fold",
    "in_range",
    "model_name",
]
