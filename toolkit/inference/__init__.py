"""Classify files, folders and web addresses, and write the answers as a table, CSV, JSON lines or a contact sheet."""
