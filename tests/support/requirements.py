"""Print what the installed rgtg_fast needs, a requirement a line."""

from importlib.metadata import requires

print(*(line for line in requires("rgtg_fast") or () if "extra ==" not in line), sep="\n")
