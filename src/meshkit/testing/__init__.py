"""What a test of a service needs: a clock, real servers, faults."""
