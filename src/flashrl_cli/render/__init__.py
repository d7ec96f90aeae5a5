"""How results look: tables, live progress, plots."""
