"""What the blueprint serves and how it speaks: negotiation, problems, operations. Only `extension` and the rooms below
`route` reach in; nothing in here runs a task.
"""
