"""A service mesh you import."""
