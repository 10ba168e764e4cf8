"""Our configuration values as Flyte types: as flytekit has them, tuples included.

flytekit describes each field of a model to the console and the compiler as a literal type. A tuple it leaves out, with a
warning: then no workflow could take that field of a value by attribute. Here a tuple of one type is described as a list, which
is what it is on its way: values travel whole, as JSON, and so do they enter cache keys.
"""

import functools
import operator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from flytekit.core.constants import CACHE_KEY_METADATA, MESSAGEPACK, SERIALIZATION_FORMAT
from flytekit.core.type_engine import TypeEngine, TypeTransformer
from flytekit.extras.pydantic_transformer.transformer import PydanticTransformer
from flytekit.models.annotation import TypeAnnotation
from flytekit.models.types import LiteralType, SimpleType, TypeStructure
from pydantic import BaseModel

from lib.config.base import Frozen


class FrozenTransformer(PydanticTransformer):
    """Converts as flytekit does; describes every field."""

    def __init__(self) -> None:
        TypeTransformer.__init__(self, "postflyte-config", Frozen, enable_type_assertions=False)

    def get_literal_type(self, t: type[BaseModel]) -> LiteralType:
        fields = {name: TypeEngine.to_literal_type(_as_list(field.annotation)) for name, field in t.model_fields.items()}
        return LiteralType(
            simple=SimpleType.STRUCT,
            metadata=t.model_json_schema(),
            structure=TypeStructure(tag="", dataclass_type=fields),
            annotation=TypeAnnotation({CACHE_KEY_METADATA: {SERIALIZATION_FORMAT: MESSAGEPACK}}),
        )


def register() -> None:
    """Make it known to flytekit; calling it again changes nothing."""
    if Frozen not in TypeEngine._REGISTRY:
        TypeEngine.register(FrozenTransformer())


def _as_list(annotation: Any) -> Any:
    """`tuple[X, ...]` as `list[X]`, also within a union; anything else as it is."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _as_list(inner[0])
    if origin is tuple and inner[1:] == (...,):
        return list[_as_list(inner[0])]  # type: ignore[misc]
    if origin in (Union, UnionType):
        return functools.reduce(operator.or_, map(_as_list, inner))
    return annotation
