"""A model taken apart, and what runs its parts: caches, attention, siblings, adapters."""
