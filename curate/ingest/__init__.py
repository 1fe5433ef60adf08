"""URL tables and existing pools become the `samples` table."""
