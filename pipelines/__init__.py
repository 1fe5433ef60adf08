"""One file per recipe: order and wiring, like the method section of its paper."""
