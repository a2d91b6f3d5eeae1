"""Tasks in an SQL database, on SQLAlchemy Core: its tables and statements, run on plain driver connections for speed."""
