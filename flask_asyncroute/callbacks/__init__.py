"""Define and check callbacks: the HTTP requests that report a task's outcome to another server."""
