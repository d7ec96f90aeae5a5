"""A launch plan as a job of a Ray cluster: what is submitted, asked of the nodes before, and followed to its end."""
