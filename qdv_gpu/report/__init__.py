"""Figures and tables from plain records."""
