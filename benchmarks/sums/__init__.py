"""Where sums are formed: what comes to the driver, what memory it takes, and rounds of very many workers."""
