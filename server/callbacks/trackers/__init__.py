"""The tools in which people watch runs, told of them by one callback."""
