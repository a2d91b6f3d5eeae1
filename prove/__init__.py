"""What the project promises under kills, races and soaks, proved at full size: ``python -m prove``."""
