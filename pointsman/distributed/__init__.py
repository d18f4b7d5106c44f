"""Processes that work together: the ranks of one model (`Mesh`), and an engine with the trainer that sends it weights (`Group`).

Both are made of torch's parts without torch's global state: a store at rank 0's address and a backend over it (`rendezvous`). Nothing but
the bytes of tensors crosses, never objects, which torch would pickle; and whatever waits has a time limit.
"""

from pointsman.distributed.group import Group
from pointsman.distributed.mesh import Mesh
from pointsman.distributed.rendezvous import listen

__all__ = ["Group", "Mesh", "listen"]
