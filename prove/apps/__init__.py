"""The apps that real servers run in proofs and live tests; each module has a ``create_app`` factory."""
