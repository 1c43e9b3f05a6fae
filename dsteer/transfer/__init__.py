"""Does a vector of one model work in another? Align, map, carry over, and test against nulls."""
