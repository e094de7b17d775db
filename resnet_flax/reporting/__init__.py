"""From the records of runs to tables and pictures beside the published numbers."""
