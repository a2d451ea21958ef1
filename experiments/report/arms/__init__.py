"""What a page says of each run: an arm of a comparison, or the only one."""
