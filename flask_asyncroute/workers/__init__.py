"""The parts of a worker process: running tasks, maintenance, heartbeat, recovery and shutdown."""
