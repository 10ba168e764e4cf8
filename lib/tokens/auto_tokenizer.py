"""transformers' AutoTokenizer, without the libraries that its import drags in for other purposes.

Importing it imports text generation, which imports scikit-learn (and with it scipy and pandas) for assisted generation
alone, where the package is installed. That is a third of the import, paid by every worker process.
"""

import transformers.utils

_is_sklearn_available = transformers.utils.is_sklearn_available
transformers.utils.is_sklearn_available = lambda: False
from transformers import AutoTokenizer as AutoTokenizer  # noqa: E402 - the import is what the line above is for

transformers.utils.is_sklearn_available = _is_sklearn_available
