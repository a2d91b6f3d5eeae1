"""Define and check callbacks, without Flask requests or stores."""
