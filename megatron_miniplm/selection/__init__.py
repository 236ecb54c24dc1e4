"""Floor 3: from scores to the instances that are kept.

Importing the room imports every file in it, so a new selector is one new file.
"""

import sys

from megatron_miniplm.core.registry import Registry

Registry.discover(sys.modules[__name__])
