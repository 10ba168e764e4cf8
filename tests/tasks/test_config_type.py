"""Every field of a configuration is described to flytekit, and values come back as they went."""

import logging

import pytest
from flytekit import FlyteContextManager
from flytekit.core.type_engine import TypeEngine

from lib.config.data import DataConfig
from lib.config.recipes import SftJob
from lib.config.rows import RowsConfig
from tasks.config_type import FrozenTransformer
from tasks.shard_type import Shard

MIXTURE = {
    "mixture": [
        {"name": "own"},
        {"name": "b", "location": "/b", "schedule": [{"step": 0, "weight": 1.0}, {"step": 9, "weight": 2.0}]},
    ]
}


@pytest.mark.parametrize("python_type", [DataConfig, RowsConfig, SftJob, Shard])
def test_every_field_has_a_type_and_none_a_warning(python_type: type, caplog: pytest.LogCaptureFixture) -> None:
    """A field without one could not be taken by attribute in a workflow."""
    with caplog.at_level(logging.WARNING):
        described = TypeEngine.to_literal_type(python_type)
    model = getattr(python_type, "__origin__", python_type)
    assert isinstance(TypeEngine.get_transformer(python_type), FrozenTransformer)
    assert described.structure.dataclass_type.keys() == model.model_fields.keys()
    assert not caplog.records


def test_values_come_back_as_they_went_and_differ_where_a_tuple_does() -> None:
    """[I1] The literal, which is the cache key, holds tuples whole."""
    context = FlyteContextManager.current_context()
    value = DataConfig.parse(MIXTURE, where="test")
    expected = TypeEngine.to_literal_type(DataConfig)
    literal = TypeEngine.to_literal(context, value, DataConfig, expected)
    assert TypeEngine.to_python_value(context, literal, DataConfig) == value
    other = value.model_copy(update={"mixture": value.mixture[::-1]})
    assert TypeEngine.to_literal(context, other, DataConfig, expected) != literal
