"""Blocks of tables that are looked up by tokens."""
