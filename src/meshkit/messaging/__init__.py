"""What a message is and what becomes of it, without a broker: envelope, events, schedule, decisions, dead letters."""
