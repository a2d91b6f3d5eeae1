"""Where tasks run: one port, `base`, and its adapters. `dispatcher` reserves, submits and cancels; nobody else does."""
