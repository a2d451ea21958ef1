"""Speed and memory against peers and limits. A package of that name comes with Opacus: this one goes first."""
