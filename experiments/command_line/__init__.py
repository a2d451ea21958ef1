"""How commands are read, refused and explained on a terminal."""
