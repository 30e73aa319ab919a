"""Nodes, paths, grids, the symbolic trace and the table: numbers only, neither torch nor diffusers."""
