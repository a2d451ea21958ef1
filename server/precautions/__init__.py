"""That nothing is spent in vain: tried before the first charge, and written down whatever the disk says."""
