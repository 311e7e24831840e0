"""`./run demo`: starts the learning hub, breaks it, repairs it, and holds the books against each other."""
