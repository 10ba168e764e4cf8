"""Map tasks whose elements are cached one by one, as on a cluster, also in a local run."""

from typing import Any

from flytekit import FlyteContext
from flytekit.core.array_node_map_task import ArrayNodeMapTask
from flytekit.core.promise import Promise, create_task_output, translate_inputs_to_literals
from flytekit.models.literals import Literal, LiteralCollection


class MapTask(ArrayNodeMapTask):
    """A task of one input and one output for each element of a list.

    flytekit's own looks up the whole list in the local cache, and so would execute all elements again where one is new.
    """

    def local_execute(self, ctx: FlyteContext, **kwargs: Any) -> Any:
        """Each element by the mapped task; the first failure ends it."""
        (name,), (output,) = self.interface.inputs, self.interface.outputs
        literals = translate_inputs_to_literals(ctx, kwargs, self.interface.inputs, self.get_input_types())
        found = [
            self.python_function_task.local_execute(ctx, **{name: Promise(name, element)}).val
            for element in literals[name].collection.literals
        ]
        return create_task_output([Promise(output, Literal(collection=LiteralCollection(found)))], self.python_interface)
