"""An event as clients submit it: its fields, its id, and what may be wrong with it."""
