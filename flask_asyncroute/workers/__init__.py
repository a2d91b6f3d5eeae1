"""A worker process: running tasks, maintenance, heartbeat, recovery and shutdown."""
