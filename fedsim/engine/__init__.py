"""Where clients run: Flower Grids over Ray actors or in this process, and the messages that cross them."""
