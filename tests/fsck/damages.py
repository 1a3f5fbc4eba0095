"""Kinds of damage, one function each: done to a state on disk, with what a check has to say of it.

The state is that of the fixture `template`: see `fsck_tree.build` for its files.
"""

from __future__ import annotations

import damages_log
import damages_slabs
import damages_tree
from damage import DAMAGES

__all__ = ["DAMAGES", "damages_log", "damages_slabs", "damages_tree"]
