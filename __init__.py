"""Lets `import quantdit` find the package from the folder that holds a clone of this repository.

There the clone is a folder of the package's name; without this file Python would take it for an empty package.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

if __name__ == "quantdit":
    _inner = Path(__file__).with_name("quantdit")
    _spec = spec_from_file_location(__name__, _inner / "__init__.py", submodule_search_locations=[str(_inner)])
    sys.modules[__name__] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])
