"""Thin adapters to other people's trainers; nothing is measured here."""
