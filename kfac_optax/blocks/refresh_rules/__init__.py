"""Rules for refreshes and for the use of inverses, put around another block."""
