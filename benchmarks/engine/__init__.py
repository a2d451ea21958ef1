"""What a round costs beyond its computation, against stock Flower and pfl-research."""
