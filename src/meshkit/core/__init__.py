"""What everything else is made of: standard library only, and it knows no policy, no broker and no web framework."""
