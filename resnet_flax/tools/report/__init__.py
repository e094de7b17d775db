"""A report on runs: tables and figures beside the published numbers."""
