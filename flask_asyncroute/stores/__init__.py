"""Where tasks are kept: one port, `base`, and its adapters. `runtime` chooses; `lifecycle` writes; reads go straight."""
