"""Internal snapshots: their table, how they are made, applied and deleted, and the VM state beside them."""
