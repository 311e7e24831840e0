"""The storm proof: services before a dependency that is down. `__main__.py` says what is shown."""
