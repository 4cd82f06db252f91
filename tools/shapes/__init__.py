"""``shapes``: a small FLUX.1 that draws coloured forms, and the programs that draw its data, train it and judge it."""
