"""Measured against peers in the same run: `./run bench`. Nothing of the product imports this."""
