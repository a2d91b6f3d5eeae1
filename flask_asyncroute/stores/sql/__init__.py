"""SQL task stores. They execute SQL text on driver connections; SQLAlchemy defines the tables and
composes the list queries.
"""
