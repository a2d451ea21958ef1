"""What runs in each library's own environment, a file a library: `python FILE FOLDER`. Imports nothing of fedsim."""
