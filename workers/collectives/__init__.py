"""All-reduces and other collectives among the ranks of a stage."""
