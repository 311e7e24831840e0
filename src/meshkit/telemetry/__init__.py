"""What meshkit tells the outside: metrics, spans, logs."""
