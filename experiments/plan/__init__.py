"""`plan`: ULS or ELS, with which group size and how many bands of noise, answered before any training."""
