"""Labels are scored, with rows shown beside the query."""
