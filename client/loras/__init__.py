"""Lend LoRAs: read their files in every spelling, and use them with the components that they change."""
